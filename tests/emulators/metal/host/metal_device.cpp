// ggml-metal-device.h over the emulated device: what ggml-metal-device.m does with Metal.

#include "metal_device.h"

#include "commands.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-metal-fusion.h"

#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>
#include <sstream>

using metal_emulator::CommandBuffer;
using metal_emulator::ConstantType;
using metal_emulator::DeviceBuffer;
using metal_emulator::Encoder;
using metal_emulator::Fault;
using metal_emulator::Pipeline;
using metal_emulator::Queue;

namespace {

// Of an M1 Max with 64 GB.
constexpr size_t WORKING_SET = size_t(48) << 30, MAX_BUFFER = size_t(36) << 30;

std::atomic<size_t> allocated{ 0 };

Queue & queue_of(ggml_metal_device_t dev) {
    return *static_cast<Queue *>(dev->queue);
}

// A copy or fill, after everything in the queue.
void run_now(ggml_metal_device_t dev, CommandBuffer::Work work) {
    const auto buffer = std::make_shared<CommandBuffer>();
    buffer->add(std::move(work));
    queue_of(dev).commit(buffer);
}

}  // namespace

//
// function constants
//

struct ggml_metal_cv {
    std::vector<metal_emulator::ConstantValue> values;

    void set(unsigned index, ConstantType type, int32_t value) { values.push_back({ index, type, value }); }
};

ggml_metal_cv_t ggml_metal_cv_init(void) {
    return new ggml_metal_cv();
}

void ggml_metal_cv_free(ggml_metal_cv_t cv) {
    delete cv;
}

void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t idx) {
    cv->set(unsigned(idx), ConstantType::int16, value);
}

void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t idx) {
    cv->set(unsigned(idx), ConstantType::int32, value);
}

void ggml_metal_cv_set_bool(ggml_metal_cv_t cv, bool value, int32_t idx) {
    cv->set(unsigned(idx), ConstantType::boolean, value);
}

//
// pipelines and libraries
//

struct ggml_metal_pipeline {
    std::unique_ptr<Pipeline> pipeline;
};

ggml_metal_pipeline_t ggml_metal_pipeline_init(void) {
    return new ggml_metal_pipeline();
}

void ggml_metal_pipeline_free(ggml_metal_pipeline_t pipeline) {
    delete pipeline;
}

int ggml_metal_pipeline_max_theads_per_threadgroup(ggml_metal_pipeline_with_params pipeline) {
    return int(pipeline.pipeline->pipeline->max_threads);
}

struct ggml_metal_library {
    ggml_metal_device_t    dev;
    std::set<std::string>  missing;
    ggml_metal_pipelines_t pipelines = ggml_metal_pipelines_init();
    std::mutex             mutex;
};

ggml_metal_library_t ggml_metal_library_init(ggml_metal_device_t dev) {
    auto * library             = new ggml_metal_library();
    library->dev               = dev;
    const char *       refused = getenv("KIMI_METAL_REFUSED");
    std::istringstream names(refused ? refused : "");
    bool               complete = true;
    for (std::string name; std::getline(names, name, ',');) {
        library->missing.insert(name);
        complete = metal_emulator_log_missing(name.c_str(), "refused by KIMI_METAL_REFUSED") && complete;
    }
    if (!complete) {
        ggml_metal_library_free(library);
        return nullptr;
    }
    return library;
}

// For the tensor API, which the device lacks.
ggml_metal_library_t ggml_metal_library_init_from_source(ggml_metal_device_t, const char *, bool) {
    return nullptr;
}

void ggml_metal_library_free(ggml_metal_library_t lib) {
    if (lib) {
        ggml_metal_pipelines_free(lib->pipelines);
        delete lib;
    }
}

ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t lib) {
    return lib->dev;
}

bool ggml_metal_library_has(ggml_metal_library_t lib, const char * name) {
    return lib && lib->missing.count(name) == 0;
}

ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    const std::lock_guard<std::mutex> lock(lib->mutex);
    ggml_metal_pipeline_with_params   result = {};
    result.pipeline                          = ggml_metal_pipelines_get(lib->pipelines, name);
    return result;
}

ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib,
                                                                    const char *         base,
                                                                    const char *         name,
                                                                    ggml_metal_cv_t      cv) {
    ggml_metal_pipeline_with_params result = ggml_metal_library_get_pipeline(lib, name);
    if (result.pipeline) {
        return result;
    }
    try {
        if (lib->missing.count(metal_emulator::file_of(base))) {
            throw Fault("kernel not found in any metal library: " + std::string(base));
        }
        std::unique_ptr<Pipeline> pipeline =
            metal_emulator::make_pipeline(base, name, cv ? cv->values : std::vector<metal_emulator::ConstantValue>());
        const std::lock_guard<std::mutex> lock(lib->mutex);
        result.pipeline           = ggml_metal_pipeline_init();
        result.pipeline->pipeline = std::move(pipeline);
        ggml_metal_pipelines_add(lib->pipelines, name, result.pipeline);
    } catch (const Fault & fault) {
        GGML_LOG_ERROR("%s: %s\n", __func__, fault.what());
    }
    return result;
}

//
// encoders
//

struct ggml_metal_encoder {
    Encoder encoder;
};

ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t cmd_buf, bool concurrent) {
    return new ggml_metal_encoder{ Encoder(*static_cast<CommandBuffer *>(cmd_buf), concurrent) };
}

void ggml_metal_encoder_free(ggml_metal_encoder_t encoder) {
    delete encoder;
}

void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}

void ggml_metal_encoder_debug_group_pop(ggml_metal_encoder_t) {}

void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t encoder, ggml_metal_pipeline_with_params pipeline) {
    if (!pipeline.pipeline) {
        GGML_ABORT("%s: no pipeline: the log above says why", __func__);
    }
    encoder->encoder.set_pipeline(pipeline.pipeline->pipeline.get());
}

void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t encoder, void * data, size_t size, int idx) {
    encoder->encoder.set_bytes(data, size, unsigned(idx));
}

void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t encoder, ggml_metal_buffer_id buffer, int idx) {
    encoder->encoder.set_buffer(static_cast<DeviceBuffer *>(buffer.metal), buffer.offs, unsigned(idx));
}

void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t encoder, size_t size, int idx) {
    encoder->encoder.set_threadgroup_memory(size, unsigned(idx));
}

void ggml_metal_encoder_dispatch_threadgroups(
    ggml_metal_encoder_t encoder, int tg0, int tg1, int tg2, int tptg0, int tptg1, int tptg2) {
    encoder->encoder.dispatch({ uint32_t(tg0), uint32_t(tg1), uint32_t(tg2) },
                              { uint32_t(tptg0), uint32_t(tptg1), uint32_t(tptg2) });
}

void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t encoder) {
    encoder->encoder.barrier();
}

void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t) {}

//
// the device
//

ggml_metal_device_t ggml_metal_device_init(int device, int n_devices) {
    auto *       dev    = new ggml_metal_device();
    const char * chosen = getenv("KIMI_METAL_DEVICE");
    const char * name   = chosen ? chosen : "Apple M1 Max";

    ggml_metal_device_props & props  = dev->props;
    props.device                     = device;
    props.device_phys                = 0;
    props.device_virt                = device;
    props.has_simdgroup_reduction    = true;
    props.has_simdgroup_mm           = true;
    props.has_unified_memory         = true;
    props.has_bfloat                 = getenv("GGML_METAL_BF16_DISABLE") == nullptr;
    props.has_tensor                 = false;
    props.use_residency_sets         = false;
    props.use_shared_buffers         = getenv("GGML_METAL_SHARED_BUFFERS_DISABLE") == nullptr;
    props.supports_gpu_family_apple7 = true;
    props.device_id                  = metal_emulator_device_id(name);
    props.gpu_family                 = strncmp(name, "Apple M", 7) == 0 ? std::min(6 + atoi(name + 7), 9) : 7;
    props.max_buffer_size            = MAX_BUFFER;
    props.max_working_set_size       = WORKING_SET;
    props.max_theadgroup_memory_size = metal_emulator::MAX_THREADGROUP_MEMORY;

    const char * offload            = getenv("GGML_OP_OFFLOAD_MIN_BATCH");
    props.op_offload_min_batch_size = offload ? atoi(offload) : 32;
    snprintf(props.name, sizeof(props.name), "MTL%d", device);
    if (n_devices > 1) {
        snprintf(props.desc, sizeof(props.desc), "%s (dev p0/v%d)", name, device);
    } else {
        snprintf(props.desc, sizeof(props.desc), "%s", name);
    }

    const char * debug = getenv("GGML_METAL_FUSION_DEBUG");
    dev->finfo   = ggml_metal_fusion_info_init(getenv("GGML_METAL_FUSION_DISABLE") == nullptr, debug ? atoi(debug) : 0);
    dev->library = ggml_metal_library_init(dev);
    if (!dev->library) {
        GGML_LOG_ERROR("%s: error: failed to create library\n", __func__);
    }
    dev->queue = new Queue();
    return dev;
}

void ggml_metal_device_free(ggml_metal_device_t dev) {
    ggml_metal_fusion_info_free(dev->finfo);
    ggml_metal_library_free(dev->library);
    delete static_cast<Queue *>(dev->queue);
    delete dev;
}

void * ggml_metal_device_get_obj(ggml_metal_device_t dev) {
    return dev;
}

void * ggml_metal_device_get_queue(ggml_metal_device_t dev) {
    return dev->queue;
}

ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t dev) {
    return dev->library;
}

// Residency sets only keep memory resident.
void ggml_metal_device_rsets_add(ggml_metal_device_t, ggml_metal_rset_t) {}

void ggml_metal_device_rsets_rm(ggml_metal_device_t, ggml_metal_rset_t) {}

void ggml_metal_device_rsets_keep_alive(ggml_metal_device_t) {}

void ggml_metal_device_get_memory(ggml_metal_device_t dev, size_t * free, size_t * total) {
    *total = dev->props.max_working_set_size;
    *free  = *total > allocated ? *total - allocated : 0;
}

const ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t dev) {
    return &dev->props;
}

ggml_metal_fusion_info * ggml_metal_device_get_fusion_info(ggml_metal_device_t dev) {
    return dev->finfo;
}

struct ggml_metal_event {
    int expected = 0;  // as encoded by the host
    int signaled = 0;
};

void ggml_metal_event_encode_signal(ggml_metal_event_t ev, ggml_metal_cmd_buf_t cmd_buf) {
    const int value = ++ev->expected;
    static_cast<CommandBuffer *>(cmd_buf)->add([ev, value] { ev->signaled = value; });
}

void ggml_metal_event_encode_wait(ggml_metal_event_t ev, ggml_metal_cmd_buf_t cmd_buf) {
    static_cast<CommandBuffer *>(cmd_buf)->add([ev, value = ev->expected] {
        if (ev->signaled < value) {
            throw Fault("a command buffer waits for an event that nothing committed before it signals");
        }
    });
}

ggml_metal_event_t ggml_metal_device_event_init(ggml_metal_device_t) {
    return new ggml_metal_event();
}

void ggml_metal_device_event_free(ggml_metal_device_t, ggml_metal_event_t ev) {
    delete ev;
}

void ggml_metal_device_event_synchronize(ggml_metal_device_t, ggml_metal_event_t ev) {
    GGML_ASSERT(ev->signaled == ev->expected);
}

//
// buffers
//

struct ggml_metal_buffer {
    struct View {
        char *                        data;
        size_t                        size;
        std::unique_ptr<DeviceBuffer> metal;
    };

    ggml_metal_device_t dev;
    void *              data;  // for the host; of a private buffer: addresses without memory
    size_t              size;
    bool                shared;
    std::vector<View>   views;  // several overlapping ones if the buffer is larger than the device allows
};

static char * memory_of(ggml_metal_buffer_id id) {
    GGML_ASSERT(id.metal);
    return static_cast<DeviceBuffer *>(id.metal)->begin + id.offs;
}

static size_t whole_pages(size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    return (bytes + page - 1) / page * page;
}

ggml_metal_buffer_t ggml_metal_buffer_init(ggml_metal_device_t dev, size_t size, bool shared) {
    static std::atomic<uintptr_t> next_private{ 0x400 };

    auto * buffer  = new ggml_metal_buffer();
    buffer->dev    = dev;
    buffer->size   = whole_pages(size);
    buffer->shared = shared && dev->props.use_shared_buffers;
    if (buffer->size) {
        auto memory  = std::make_unique<DeviceBuffer>(buffer->size);
        buffer->data = buffer->shared ? memory->begin : reinterpret_cast<char *>(next_private.fetch_add(buffer->size));
        allocated += buffer->size;
        buffer->views.push_back({ static_cast<char *>(buffer->data), size, std::move(memory) });
    }
    return buffer;
}

ggml_metal_buffer_t ggml_metal_buffer_map(ggml_metal_device_t dev, void * ptr, size_t size, size_t max_tensor_size) {
    auto * buffer       = new ggml_metal_buffer();
    buffer->dev         = dev;
    buffer->data        = ptr;
    buffer->size        = size;
    buffer->shared      = true;
    const size_t page   = size_t(sysconf(_SC_PAGESIZE));
    const size_t offset = uintptr_t(ptr) % page;
    char * const first  = static_cast<char *>(ptr) - offset;
    const size_t whole = size + offset, limit = dev->props.max_buffer_size;
    // views overlap by more than the largest tensor
    const size_t step = whole <= limit ? whole : limit - (whole_pages(max_tensor_size) + page);
    for (size_t at = 0; at < whole; at += step) {
        const size_t bytes = std::min(limit, whole - at);
        buffer->views.push_back({ first + at, bytes, std::make_unique<DeviceBuffer>(first + at, whole_pages(bytes)) });
    }
    return buffer;
}

void ggml_metal_buffer_free(ggml_metal_buffer_t buf) {
    for (const ggml_metal_buffer::View & view : buf->views) {
        allocated -= view.metal->owned ? view.metal->bytes : 0;
    }
    delete buf;
}

void * ggml_metal_buffer_get_base(ggml_metal_buffer_t buf) {
    return buf->data;
}

bool ggml_metal_buffer_is_shared(ggml_metal_buffer_t buf) {
    return buf->shared;
}

ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t buf, const ggml_tensor * t) {
    const size_t bytes = ggml_nbytes(t);
    for (const ggml_metal_buffer::View & view : buf->views) {
        const ptrdiff_t offset = static_cast<const char *>(t->data) - view.data;
        if (offset >= 0 && size_t(offset) + bytes <= view.size) {
            return { view.metal.get(), size_t(offset) };
        }
    }
    GGML_LOG_ERROR("%s: error: tensor '%s' buffer is nil\n", __func__, t->name);
    return { nullptr, 0 };
}

// The host may access shared memory at once; a copy from or to private memory is a command.
void ggml_metal_buffer_memset_tensor(
    ggml_metal_buffer_t buf, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    char * const at = memory_of(ggml_metal_buffer_get_id(buf, tensor)) + offset;
    run_now(buf->dev, [=] { memset(at, value, size); });
}

void ggml_metal_buffer_set_tensor(
    ggml_metal_buffer_t buf, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    char * const at = memory_of(ggml_metal_buffer_get_id(buf, tensor)) + offset;
    run_now(buf->dev, [=] { memcpy(at, data, size); });
}

void ggml_metal_buffer_get_tensor(
    ggml_metal_buffer_t buf, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    const char * const at = memory_of(ggml_metal_buffer_get_id(buf, tensor)) + offset;
    run_now(buf->dev, [=] { memcpy(data, at, size); });
}

bool ggml_metal_buffer_cpy_tensor(ggml_metal_buffer_t buf, const ggml_tensor * src, ggml_tensor * dst) {
    const auto from = ggml_metal_buffer_get_id(static_cast<ggml_metal_buffer_t>(src->buffer->context), src);
    const auto to   = ggml_metal_buffer_get_id(buf, dst);
    if (!from.metal || !to.metal) {
        return false;
    }
    run_now(buf->dev, [=] { memmove(memory_of(to), memory_of(from), ggml_nbytes(src)); });
    return true;
}

void ggml_metal_buffer_clear(ggml_metal_buffer_t buf, uint8_t value) {
    for (const ggml_metal_buffer::View & view : buf->views) {
        memset(view.metal->begin, value, view.metal->bytes);
    }
}
