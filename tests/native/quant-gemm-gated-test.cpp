// Gate and up of a SwiGLU computed as one: bit-identical to the single nodes for every type and layout, dense and with
// experts, any number of threads; and not fused if another node needs the intermediate results. To detect fusion, the
// memory of the gate is filled with NaN, which a fused run does not overwrite.
// Prints one line per failure and the count; exit status 1 if there was a failure.

#include "check.h"
#include "common/ggml-op-marks.h"
#include "cpu_backend.h"
#include "ggml-alloc.h"
#include "ggml-cpu.h"

#include <cmath>
#include <random>

struct Shape {
    ggml_type   type      = GGML_TYPE_Q8_0;
    bool        repack    = false;
    int64_t     n_experts = 0;  // 0: MUL_MAT
    int64_t     n_rows    = 104;
    int64_t     n_tokens  = 9;
    std::string apart;  // what prevents fusion: output, read, activations, ids, glu, off
    bool        up_first = false;
    bool        as_one   = true;  // expected result
};

static std::string name_of(const Shape & s) {
    return text("%s%s, %d experts, %d rows, %d tokens, %s%s: ", ggml_type_name(s.type), s.repack ? " repacked" : "",
                (int) s.n_experts, (int) s.n_rows, (int) s.n_tokens, s.apart.c_str(), s.up_first ? " up first" : "");
}

static ggml_backend_buffer_type_t buffer_type(bool repack) {
    ggml_backend_buffer_type_t found = repack ? repack_buffer_type() : nullptr;
    return found != nullptr ? found : ggml_backend_cpu_buffer_type();
}

struct Answer {
    std::vector<uint8_t> bits;
    bool                 as_one;
};

static Answer compute(const Shape & s, bool together, int n_threads) {
    constexpr int64_t K = 512, USED = 2;
    ggml_backend_t    backend = ggml_backend_cpu_init();
    ggml_init_params  params  = { ggml_tensor_overhead() * 32 + ggml_graph_overhead(), nullptr, true };
    ggml_context *    w_ctx   = ggml_init(params);
    ggml_context *    ctx     = ggml_init(params);
    const int64_t     n       = s.n_experts > 0 ? s.n_experts : 1;
    ggml_tensor *     w[2];
    ggml_tensor *     x[2];
    ggml_tensor *     ids[2];
    for (int i = 0; i < 2; i++) {
        w[i]   = s.n_experts ? ggml_new_tensor_3d(w_ctx, s.type, K, s.n_rows, n)
                             : ggml_new_tensor_2d(w_ctx, s.type, K, s.n_rows);
        x[i]   = s.n_experts ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, K, 1, s.n_tokens)
                             : ggml_new_tensor_2d(ctx, GGML_TYPE_F32, K, s.n_tokens);
        ids[i] = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, USED, s.n_tokens);
    }
    ggml_tensor * product[2];  // gate, up
    for (const int i : { s.up_first ? 1 : 0, s.up_first ? 0 : 1 }) {
        ggml_tensor * acts = s.apart == "activations" ? x[i] : x[0];
        product[i]         = s.n_experts ? ggml_mul_mat_id(ctx, w[i], acts, s.apart == "ids" ? ids[i] : ids[0])
                                         : ggml_mul_mat(ctx, w[i], acts);
        if (s.apart == "off") {
            ggml_op_set_mark(product[i], GGML_OP_MARK_UPSTREAM);
        }
        if (s.apart == "output" || !together) {
            ggml_set_output(product[i]);
        }
    }
    ggml_tensor * result = s.apart == "glu" ? ggml_geglu_split(ctx, product[0], product[1])
                                            : ggml_swiglu_split(ctx, product[0], product[1]);
    if (s.apart == "read") {
        result = ggml_add(ctx, result, product[0]);
    }
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, product[s.up_first ? 1 : 0]);
    ggml_build_forward_expand(graph, result);

    ApartBuffers buffers;
    buffers.allocate(ctx, backend);
    ggml_backend_buffer_t           w_buffer = ggml_backend_alloc_ctx_tensors_from_buft(w_ctx, buffer_type(s.repack));
    std::mt19937                    rng(5);
    std::normal_distribution<float> normal;
    for (int i = 0; i < 2; i++) {
        std::vector<float> values(ggml_nelements(w[i]));
        for (float & each : values) {
            each = 0.1f * normal(rng);
        }
        std::vector<uint8_t> stored(ggml_nbytes(w[i]));
        ggml_quantize_chunk(s.type, values.data(), stored.data(), 0, s.n_rows * n, K, nullptr);
        ggml_backend_tensor_set(w[i], stored.data(), 0, stored.size());
        values.resize(ggml_nelements(x[i]));
        for (float & each : values) {
            each = normal(rng);
        }
        ggml_backend_tensor_set(x[i], values.data(), 0, ggml_nbytes(x[i]));
        std::vector<int32_t> routing(USED * s.n_tokens);
        for (int64_t t = 0; t < s.n_tokens; t++) {
            routing[2 * t]     = (int32_t) (t * t % n);
            routing[2 * t + 1] = (int32_t) ((t * t + 1 + i) % n);
        }
        ggml_backend_tensor_set(ids[i], routing.data(), 0, ggml_nbytes(ids[i]));
    }
    ggml_backend_cpu_set_n_threads(backend, n_threads);
    ggml_backend_graph_compute(backend, graph);
    Answer answer;
    answer.bits.resize(ggml_nbytes(result));
    ggml_backend_tensor_get(result, answer.bits.data(), 0, answer.bits.size());
    float first;
    ggml_backend_tensor_get(product[0], &first, 0, sizeof(first));
    answer.as_one = std::isnan(first);
    ggml_backend_buffer_free(w_buffer);
    ggml_free(ctx);
    ggml_free(w_ctx);
    ggml_backend_free(backend);
    return answer;
}

static void check(const Shape & s) {
    if (!chosen()) {
        return;
    }
    const std::string name  = name_of(s);
    const Answer      apart = compute(s, false, 1);
    expect(!apart.as_one, name + "ran as one though both were wanted");
    std::vector<int> counts = thread_counts();
    counts.push_back(1);
    for (const int n_threads : counts) {
        const Answer together = compute(s, true, n_threads);
        expect(together.as_one == s.as_one, name + (s.as_one ? "did not run as one" : "ran as one"));
        expect(together.bits == apart.bits, name + text("not the bits of single nodes with %d threads", n_threads));
    }
}

int main() {
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    const struct {
        ggml_type type;
        bool      repack;
    } kinds[] = { { GGML_TYPE_Q4_0, false },   { GGML_TYPE_Q4_0, true },   { GGML_TYPE_Q8_0, false },
                  { GGML_TYPE_Q4_K, false },   { GGML_TYPE_Q6_K, false },  { GGML_TYPE_Q5_K, false },
                  { GGML_TYPE_IQ4_XS, false }, { GGML_TYPE_MXFP4, false }, { GGML_TYPE_MXFP4, true },
                  { GGML_TYPE_Q2_K, false },   { GGML_TYPE_Q2_K, true },   { GGML_TYPE_Q3_K, false } };
    for (const auto & kind : kinds) {
        if (kind.repack && !cpu_has("AVX512_VNNI")) {
            continue;  // upstream's matmul computes interleaved rows
        }
        Shape s;
        s.type   = kind.type;
        s.repack = kind.repack;
        for (const int64_t n_experts : { 0, 3 }) {
            s.n_experts = n_experts;
            for (const int64_t n_tokens : { 1, 2, 9, 70, 300 }) {
                for (const int64_t n_rows : { 8, 104, 448 }) {  // 448: the last results are streamed
                    s.n_tokens = n_tokens;
                    s.n_rows   = n_rows;
                    s.up_first = n_rows == 448;
                    check(s);
                }
            }
        }
    }
    for (const int64_t n_experts : { 0, 3 }) {
        for (const char * apart : { "output", "read", "activations", "ids", "glu", "off" }) {
            Shape s;
            s.n_experts = n_experts;
            s.apart     = apart;
            s.as_one    = s.apart == "ids" && n_experts == 0;  // a dense matmul has no ids
            check(s);
        }
    }
    return report();
}
