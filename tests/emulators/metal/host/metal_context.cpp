// ggml-metal-context.h over the emulated device: what ggml-metal-context.m does with command buffers.
//
// As there, a graph is divided into n_cb + 1 command buffers with one encoder each: the first encodes max(64, n / 10)
// nodes, the others share the rest. Here they are encoded one after another.

#include "ggml-metal-context.h"

#include "commands.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-metal-common.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-ops.h"
#include "metal_device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

using metal_emulator::CommandBuffer;
using metal_emulator::Fault;
using metal_emulator::Queue;
using metal_emulator::Range;

namespace {

constexpr int MAX_COMMAND_BUFFERS = 8;

using Commands = std::shared_ptr<CommandBuffer>;

// A fault is an error of the code under test.
[[noreturn]] void end_process(const Fault & fault) {
    fprintf(stderr, "metal emulator: %s\n", fault.what());
    std::_Exit(1);
}

void commit(ggml_metal_device_t dev, const Commands & commands) {
    try {
        static_cast<Queue *>(dev->queue)->commit(commands);
    } catch (const Fault & fault) {
        end_process(fault);
    }
}

ggml_metal_buffer_id id_of(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return ggml_metal_buffer_get_id(static_cast<ggml_metal_buffer_t>(buffer->context), t);
}

char * memory_of(const ggml_tensor * t) {
    const ggml_metal_buffer_id id = id_of(t);
    return id.metal ? static_cast<metal_emulator::DeviceBuffer *>(id.metal)->begin + id.offs : nullptr;
}

void add_range(std::vector<Range> & ranges, const ggml_tensor * t, bool writable) {
    const char * begin = memory_of(t);
    const size_t bytes =
        writable && !t->view_src ? ggml_backend_buft_get_alloc_size(t->buffer->buft, t) : ggml_nbytes(t);
    ranges.push_back({ begin, begin + bytes, writable });
}

}  // namespace

struct ggml_metal {
    ggml_metal_device_t      dev;
    ggml_metal_event_t       ev_cpy, ev_sync;
    ggml_metal_fusion_info * finfo;
    bool                     use_concurrency, use_graph_optimize;
    int                      debug_graph;
    int                      n_cb = 0;

    void encode(ggml_cgraph * graph, int begin, int end, const Commands & commands);
};

ggml_metal_t ggml_metal_init(ggml_metal_device_t dev) {
    if (!ggml_metal_device_get_library(dev)) {
        return nullptr;
    }
    auto * ctx              = new ggml_metal();
    ctx->dev                = dev;
    ctx->ev_cpy             = ggml_metal_device_event_init(dev);
    ctx->ev_sync            = ggml_metal_device_event_init(dev);
    ctx->finfo              = ggml_metal_device_get_fusion_info(dev);
    ctx->use_concurrency    = getenv("GGML_METAL_CONCURRENCY_DISABLE") == nullptr;
    ctx->use_graph_optimize = getenv("GGML_METAL_GRAPH_OPTIMIZE_DISABLE") == nullptr;
    const char * debug      = getenv("GGML_METAL_GRAPH_DEBUG");
    ctx->debug_graph        = debug ? atoi(debug) : 0;
    if (ggml_metal_fusion_info_stats(ctx->finfo)) {
        ggml_metal_fusion_info_labels_init(ctx->finfo);
    }
    return ctx;
}

void ggml_metal_free(ggml_metal_t ctx) {
    ggml_metal_device_event_free(ctx->dev, ctx->ev_cpy);
    ggml_metal_device_event_free(ctx->dev, ctx->ev_sync);
    delete ctx;
}

const char * ggml_metal_get_name(ggml_metal_t ctx) {
    return ctx->dev->props.name;
}

// Commands run when they are committed.
void ggml_metal_synchronize(ggml_metal_t) {}

void ggml_metal_set_tensor_async(
    ggml_metal_t ctx, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    const auto   commands = std::make_shared<CommandBuffer>();
    char * const at       = memory_of(tensor) + offset;
    commands->add([=] { memcpy(at, data, size); });
    commit(ctx->dev, commands);
}

void ggml_metal_get_tensor_async(
    ggml_metal_t ctx, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    const auto         commands = std::make_shared<CommandBuffer>();
    const char * const at       = memory_of(tensor) + offset;
    commands->add([=] { memcpy(data, at, size); });
    commit(ctx->dev, commands);
}

bool ggml_metal_cpy_tensor_async(ggml_metal_t        ctx_src,
                                 ggml_metal_t        ctx_dst,
                                 const ggml_tensor * src,
                                 ggml_tensor *       dst) {
    const char * const from = memory_of(src);
    char * const       to   = memory_of(dst);
    if (!from || !to) {
        return false;
    }
    const auto reached = std::make_shared<CommandBuffer>();
    ggml_metal_event_encode_signal(ctx_dst->ev_sync, reached.get());
    commit(ctx_dst->dev, reached);

    const auto copy = std::make_shared<CommandBuffer>();
    ggml_metal_event_encode_wait(ctx_dst->ev_sync, copy.get());
    copy->add([=, bytes = ggml_nbytes(src)] { memmove(to, from, bytes); });
    ggml_metal_event_encode_signal(ctx_src->ev_cpy, copy.get());
    commit(ctx_src->dev, copy);

    ggml_metal_event_wait(ctx_dst, ctx_src->ev_cpy);
    return true;
}

// The nodes from `begin` to `end`, by one encoder. Dispatches may access the tensors of their nodes only.
void ggml_metal::encode(ggml_cgraph * graph, int begin, int end, const Commands & commands) {
    std::vector<ggml_tensor *> nodes;  // as ggml_metal_op counts them
    for (int i = begin; i < end; i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (!ggml_op_is_empty(node->op) && !ggml_is_empty(node)) {
            nodes.push_back(node);
        }
    }
    const ggml_metal_op_t op =
        ggml_metal_op_init(dev, commands.get(), graph, finfo, begin, end, use_concurrency, false, debug_graph);
    for (int i = 0; i < ggml_metal_op_n_nodes(op);) {
        const size_t before = commands->commands.size();
        const int    count  = ggml_metal_op_encode(op, i);
        if (count == 0) {
            break;
        }
        std::string        label;
        std::vector<Range> ranges;
        for (int n = i; n < i + count && n < int(nodes.size()); n++) {
            label += (n > i ? "+" : "") + std::string(ggml_op_desc(nodes[n]));
            add_range(ranges, nodes[n], true);
            for (const ggml_tensor * src : nodes[n]->src) {
                if (src) {
                    add_range(ranges, src, false);
                }
            }
        }
        label += std::string(" '") + nodes[i]->name + "'";
        commands->mark(before, label, ranges);
        i += count;
    }
    ggml_metal_op_free(op);
}

ggml_status ggml_metal_graph_compute(ggml_metal_t ctx, ggml_cgraph * gf) {
    const int n_nodes = ggml_graph_n_nodes(gf);
    if (n_nodes == 0) {
        return GGML_STATUS_SUCCESS;
    }
    const int first  = ctx->n_cb == 0 ? n_nodes : std::min(std::max(64, int(0.1 * n_nodes)), n_nodes);
    const int rest   = n_nodes - first;
    const int others = ctx->n_cb == 0 ? 0 : (rest + ctx->n_cb - 1) / ctx->n_cb;
    for (int i = -1; i < ctx->n_cb; i++) {
        const auto commands = std::make_shared<CommandBuffer>();
        const int  begin    = i < 0 ? 0 : first + std::min(i * others, rest);
        const int  end      = i < 0 ? first : first + std::min((i + 1) * others, rest);
        try {
            ctx->encode(gf, begin, end, commands);
        } catch (const Fault & fault) {
            end_process(fault);
        }
        commit(ctx->dev, commands);
    }
    return GGML_STATUS_SUCCESS;
}

void ggml_metal_graph_optimize(ggml_metal_t ctx, ggml_cgraph * gf) {
    if (ctx->use_graph_optimize) {
        ggml_graph_optimize(gf);
    }
}

void ggml_metal_event_record(ggml_metal_t ctx, ggml_metal_event_t ev) {
    const auto commands = std::make_shared<CommandBuffer>();
    ggml_metal_event_encode_signal(ev, commands.get());
    commit(ctx->dev, commands);
}

void ggml_metal_event_wait(ggml_metal_t ctx, ggml_metal_event_t ev) {
    const auto commands = std::make_shared<CommandBuffer>();
    ggml_metal_event_encode_wait(ev, commands.get());
    commit(ctx->dev, commands);
}

ggml_metal_event_t ggml_metal_get_ev_cpy(ggml_metal_t ctx) {
    return ctx->ev_cpy;
}

void ggml_metal_set_n_cb(ggml_metal_t ctx, int n_cb) {
    ctx->n_cb = ggml_metal_fusion_info_stats(ctx->finfo) ? 0 : std::min(n_cb, MAX_COMMAND_BUFFERS);
}

// Upstream asks it only while it captures a graph.
void ggml_metal_set_abort_callback(ggml_metal_t, ggml_abort_callback, void *) {}

bool ggml_metal_supports_family(ggml_metal_t ctx, int family) {
    return family <= ctx->dev->props.gpu_family;
}

void ggml_metal_capture_next_compute(ggml_metal_t) {}
