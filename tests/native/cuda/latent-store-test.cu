// The new key of a token in an MLA layer (ggml_ops/latent_attention/cuda/latent-store.cu): its norm next to float64, its
// row in each type next to upstream's SET_ROWS, and which nodes are left to upstream.

#include "check.h"
#include "device-graph.cuh"
#include "ggml-op-marks.h"
#include "kimi/latent-store.cuh"
#include "set-rows.cuh"

#include <cmath>
#include <vector>

using namespace cuda_emulator;

constexpr int64_t LATENT = 512, ROPE = 64, ROW = LATENT + ROPE, CELLS = 5, CELL = 3;
constexpr float   EPS = 1e-5f;

struct Key : DeviceGraph {
    ggml_tensor * kv, *norm, *scaled, *factors, *concat, *cells, *cache, *stored;
    ggml_cgraph * graph;

    explicit Key(ggml_type type, int64_t n_tokens = 1, int64_t rope = ROPE, bool viewed = true, bool rotated = false) {
        const int64_t row    = LATENT + rope;
        kv                   = column(row, n_tokens);
        factors              = column(LATENT);
        factors->buffer      = weights;
        ggml_tensor * latent = ggml_view_2d(ctx, kv, LATENT, n_tokens, kv->nb[1], 0);
        ggml_tensor * tail   = ggml_view_3d(ctx, kv, rope, 1, n_tokens, kv->nb[1], kv->nb[1], LATENT * sizeof(float));
        tail                 = rotated ? result(ggml_scale(ctx, tail, 2.0f)) : tail;  // as RoPE
        norm                 = result(ggml_rms_norm(ctx, latent, EPS));
        scaled               = result(ggml_mul(ctx, norm, factors));
        concat               = result(ggml_concat(ctx, ggml_reshape_3d(ctx, scaled, LATENT, 1, n_tokens), tail, 0));
        cache                = place(ggml_new_tensor_2d(ctx, type, row, CELLS), results);
        cells                = place(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_tokens), results);
        memset(cache->data, 0x5a, ggml_nbytes(cache));
        for (int64_t i = 0; i < n_tokens; ++i) {
            static_cast<int64_t *>(cells->data)[i] = CELL - i;
        }
        ggml_tensor * rows = viewed ? ggml_view_2d(ctx, concat, row, n_tokens, concat->nb[2], 0)
                                    : ggml_reshape_2d(ctx, concat, row, n_tokens);
        stored             = ggml_set_rows(ctx, cache, rows, cells);
        graph              = graph_of(stored);
    }

    // The nodes that are done after the norm.
    int fuse() {
        n_submitted = 0;
        return ggml_cuda_latent_store(cuda, graph, index_of(graph, norm));
    }

    std::vector<char> bytes(int64_t cell) {
        const char * from = static_cast<const char *>(cache->data) + cell * cache->nb[1];
        return std::vector<char>(from, from + cache->nb[1]);
    }
};

static void test_types() {
    Key           floats(GGML_TYPE_F32);
    const float * kv      = static_cast<const float *>(floats.kv->data);
    double        squares = 0, error = 0, power = 0;
    for (int64_t i = 0; i < LATENT; ++i) {
        squares += double(kv[i]) * kv[i];
    }
    const int n_after = index_of(floats.graph, floats.stored) - index_of(floats.graph, floats.norm);
    expect(floats.fuse() == n_after && n_submitted == 1, "f32: one launch");
    const float * row = static_cast<const float *>(floats.cache->data) + CELL * ROW;
    for (int64_t i = 0; i < LATENT; ++i) {
        const double want =
            kv[i] / std::sqrt(squares / LATENT + EPS) * static_cast<const float *>(floats.factors->data)[i];
        error += std::pow(row[i] - want, 2);
        power += want * want;
    }
    expect(error <= 1e-13 * power, text("f32: NMSE %.1e", error / power));
    expect(std::equal(row + LATENT, row + ROW, kv + LATENT), "f32: the part after the latent");

    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (const bool viewed : { true, false }) {
            const std::string name = ggml_type_name(type);
            Key               upstream(type), ours(type, 1, ROPE, viewed);
            memcpy(upstream.concat->data, row, ROW * sizeof(float));
            ggml_cuda_op_set_rows(upstream.cuda, upstream.stored);
            memcpy(ours.kv->data, floats.kv->data, ggml_nbytes(ours.kv));
            memcpy(ours.factors->data, floats.factors->data, ggml_nbytes(ours.factors));
            expect(ours.fuse() > 0 && n_submitted == 1, name + ": one launch");
            for (int64_t cell = 0; cell < CELLS; ++cell) {
                expect(ours.bytes(cell) == upstream.bytes(cell), name + text(": cell %d, upstream's bits", int(cell)));
            }
        }
    }
}

static void test_refusals() {
    const auto expect_not = [](Key & key, const char * what) {
        expect(key.fuse() == 0 && n_submitted == 0, std::string("left to upstream: ") + what);
    };
    Key two(GGML_TYPE_F16, 2);
    expect_not(two, "two tokens");
    Key other(GGML_TYPE_Q5_1);
    expect_not(other, "another type");
    Key odd(GGML_TYPE_F16, 1, 48);
    expect_not(odd, "a row whose length is no multiple of 32");
    Key long_row(GGML_TYPE_F16, 1, 544);
    expect_not(long_row, "a row of more than 1024 values");
    Key rotated(GGML_TYPE_F16, 1, ROPE, true, true);
    expect_not(rotated, "a part after the latent that is computed in between");
    Key square(GGML_TYPE_F16);
    square.scaled->src[1] = square.norm;
    expect_not(square, "a norm times itself");
    Key twice(GGML_TYPE_F16, 1, LATENT);
    twice.concat->src[1] = twice.concat->src[0];
    expect_not(twice, "a latent after itself");
    Key branch(GGML_TYPE_F16);
    branch.cuda.curr_stream_no = 1;
    expect_not(branch, "another stream");
    Key marked(GGML_TYPE_F16);
    ggml_op_set_mark(marked.norm, GGML_OP_MARK_UNFUSED);
    expect_not(marked, "a marked node");
    Key used(GGML_TYPE_F16);
    ggml_build_forward_expand(used.graph, ggml_scale(used.ctx, used.concat, 2.0f));
    expect_not(used, "a key that is used elsewhere");
    Key values(GGML_TYPE_F16);
    ggml_build_forward_expand(values.graph, ggml_scale(values.ctx, values.scaled, 2.0f));
    expect_not(values, "a latent that is used elsewhere");
}

int main() {
    test_types();
    test_refusals();
    return report();
}
