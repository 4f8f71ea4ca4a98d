// Matmuls of quantized weights against float64: every type in every layout, MUL_MAT and MUL_MAT_ID, hostile shapes and
// values; bit-identical for any number of threads and of columns, also on NUMA machines; nothing written outside the
// result. Uses only ggml's public interface. Prints one line per failure and the count; exit status 1 if there was a failure.

#include "check.h"
#include "common/ggml-op-marks.h"
#include "cpu_backend.h"
#include "ggml-alloc.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <random>
#include <set>

// Against float64 on the dequantized weights and on the activations as ggml quantizes them for the type.
static const double EXACT_LIMIT = 1e-10;

// Replaces ggml-cpu's function of this name.
static bool             numa = false;
static std::atomic<int> numa_asked;

bool ggml_is_numa(void) {
    numa_asked++;
    return numa;
}

struct Shape {
    ggml_type   type;
    bool        repack    = false;  // weights in the repack buffer type, if it supports them
    int64_t     k         = 512;
    int64_t     n_rows    = 64;
    int64_t     n_tokens  = 16;
    int64_t     n_experts = 0;  // 0: MUL_MAT
    int64_t     n_used    = 2;
    bool        broadcast = true;   // MUL_MAT_ID: all slots of a token read the same activations
    int64_t     n_planes  = 1;      // MUL_MAT: planes of activations, ...
    int64_t     n_weights = 1;      // ... and of weights
    bool        strided   = false;  // activations are views of longer rows
    bool        invariant = false;  // marked GGML_OP_MARK_INVARIANT
    std::string values =
        "normal";  // normal, zeros (some rows of both are zero), huge, tiny, faint (weights, near 1e-38), full (the
                   // largest quants of both nearly everywhere, so that integer sums are as large as they can be)
    std::string routing =
        "mixed";  // mixed, one (all tokens to one expert), lonely (one token to each expert, all others to the last)
};

static std::string name_of(const Shape & s) {
    return text("%s%s %s k %d rows %d tokens %d experts %d/%d planes %d/%d%s%s %s %s", ggml_type_name(s.type),
                s.repack ? " repacked" : "", s.n_experts ? "MUL_MAT_ID" : "MUL_MAT", (int) s.k, (int) s.n_rows,
                (int) s.n_tokens, (int) s.n_used, (int) s.n_experts, (int) s.n_weights, (int) s.n_planes,
                s.broadcast ? "" : " own", s.strided ? " strided" : "", s.values.c_str(), s.routing.c_str());
}

// A row of activations after ggml's quantization for this weight type, in float64.
static std::vector<double> quantised(ggml_type weights, const float * x, int64_t k) {
    const ggml_type      type = cpu_traits(weights)->vec_dot_type;
    std::vector<double>  out(k);
    std::vector<uint8_t> bytes(ggml_row_size(type, k));
    cpu_traits(type)->from_float(x, bytes.data(), k);
    if (type == GGML_TYPE_Q8_K) {  // float d; int8_t qs[256]; int16_t bsums[16]
        const size_t size = ggml_type_size(type);
        for (int64_t i = 0; i < k; i++) {
            float d;
            memcpy(&d, bytes.data() + i / 256 * size, sizeof(d));
            out[i] = (double) d * (int8_t) bytes[i / 256 * size + sizeof(d) + i % 256];
        }
        return out;
    }
    std::vector<float> values(k);
    ggml_get_type_traits(type)->to_float(bytes.data(), values.data(), k);
    return std::vector<double>(values.begin(), values.end());
}

struct Case {
    explicit Case(const Shape & shape) : s(shape), rng(7), backend(cpu_backend()) {
        ggml_init_params params = { ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, true };
        weights_ctx             = ggml_init(params);
        ctx                     = ggml_init(params);
        const int64_t matrices  = s.n_experts ? s.n_experts : s.n_weights;
        weights = matrices == 1 && !s.n_experts ? ggml_new_tensor_2d(weights_ctx, s.type, s.k, s.n_rows)
                                                : ggml_new_tensor_3d(weights_ctx, s.type, s.k, s.n_rows, matrices);
        const int64_t slots  = s.n_experts && !s.broadcast ? s.n_used : 1;
        const int64_t longer = s.strided ? s.k + 96 : s.k;
        full                 = s.n_experts ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, longer, slots, s.n_tokens)
                                           : ggml_new_tensor_3d(ctx, GGML_TYPE_F32, longer, s.n_tokens, s.n_planes);
        acts                 = ggml_view_3d(ctx, full, s.k, full->ne[1], full->ne[2], full->nb[1], full->nb[2], 0);
        if (s.n_experts) {
            ids    = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, s.n_used, s.n_tokens);
            result = ggml_mul_mat_id(ctx, weights, acts, ids);
        } else {
            result = ggml_mul_mat(ctx, weights, acts);
        }
        if (s.invariant) {
            ggml_op_set_mark(result, GGML_OP_MARK_INVARIANT);
        }
        graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, result);
        buffers.allocate(ctx, backend);
        if (s.repack && repack_buffer_type() != nullptr) {
            repacked = ggml_backend_alloc_ctx_tensors_from_buft(weights_ctx, repack_buffer_type());
        } else {
            buffers.allocate(weights_ctx, backend);
        }
        fill();
    }

    ~Case() {
        ggml_backend_buffer_free(repacked);
        ggml_free(weights_ctx);
        ggml_free(ctx);
        ggml_backend_free(backend);
    }

    std::vector<float> compute(int n_threads) {
        cpu_backend_use(backend, n_threads, false);
        std::vector<float> out(ggml_nelements(result), NAN);
        ggml_backend_tensor_set(result, out.data(), 0, ggml_nbytes(result));
        if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
            return out;
        }
        ggml_backend_tensor_get(result, out.data(), 0, ggml_nbytes(result));
        return out;
    }

    // Replaces a value in the middle of a row of activations.
    void set_value(int64_t row, float value) {
        ggml_backend_tensor_set(full, &value, row * full->nb[1] + s.k / 2 * sizeof(float), sizeof(value));
    }

    // sums over all columns of the result: squared error, and squared value
    double nmse(const std::vector<float> & out) const {
        double error = 0, power = 0;
        for (int64_t column = 0; column < (int64_t) out.size() / s.n_rows; column++) {
            const int64_t             slot   = s.n_experts ? column % s.n_used : 0;
            const int64_t             token  = s.n_experts ? column / s.n_used : column;
            const int64_t             plane  = s.n_experts ? 0 : column / s.n_tokens;
            const int64_t             matrix = s.n_experts ? routing[column] : plane / (s.n_planes / s.n_weights);
            const int64_t             row    = s.n_experts ? slot % full->ne[1] + token * full->ne[1] : token;
            const std::vector<double> x      = quantised(s.type, &x_values[row * full->ne[0]], s.k);
            for (int64_t r = 0; r < s.n_rows; r++) {
                const float * w   = &w_values[(matrix * s.n_rows + r) * s.k];
                double        sum = 0;
                for (int64_t i = 0; i < s.k; i++) {
                    sum += w[i] * x[i];
                }
                const double difference = out[column * s.n_rows + r] - sum;
                error += difference * difference;
                power += sum * sum;
            }
        }
        return power == 0 ? error : error / power;
    }

  private:
    void fill() {
        std::normal_distribution<float> normal;
        const float                     huge  = s.type == GGML_TYPE_F16 ? 200.0f : 1e4f;  // the largest F16 is 65504
        const bool                      faint = s.values == "faint";
        const float                     scale = s.values == "huge" || faint ? huge : s.values == "tiny" ? 1e-6f : 1.0f;
        const float                     strength = s.values == "huge" ? 100.0f : faint ? 3.2e-38f : 0.02f;
        const int64_t                   matrices = weights->ne[2];
        std::vector<float>              w(s.k * s.n_rows * matrices);
        for (int64_t i = 0; i < (int64_t) w.size(); i++) {
            const bool zero = s.values == "zeros" && i / s.k % 5 == 3;
            w[i]            = zero ? 0.0f : normal(rng) * strength * (1 + 10 * (i / 32 % 7 == 0));
        }
        const bool full_sums = s.values == "full";
        for (int64_t i = 0; full_sums && i < (int64_t) w.size(); i++) {
            w[i] = i % 32 == 4 ? -1.0f : 0.9f;
        }
        std::vector<uint8_t> stored(ggml_nbytes(weights));
        ggml_quantize_chunk(s.type, w.data(), stored.data(), 0, s.n_rows * matrices, s.k, nullptr);
        ggml_backend_tensor_set(weights, stored.data(), 0, stored.size());
        w_values.resize(w.size());
        if (s.type == GGML_TYPE_F32) {
            w_values = w;
        } else {
            ggml_get_type_traits(s.type)->to_float(stored.data(), w_values.data(), w.size());
        }

        x_values.assign(ggml_nelements(full), NAN);  // the gaps between strided rows are never read
        for (int64_t r = 0; r < ggml_nrows(full); r++) {
            for (int64_t i = 0; i < s.k; i++) {
                const bool zero               = s.values == "zeros" && (r % 3 == 1 || i / 32 % 4 == 2);
                x_values[r * full->ne[0] + i] = zero ? 0.0f : normal(rng) * scale * (1 + 30 * (i % 61 == 0));
            }
            if (full_sums) {
                std::fill_n(&x_values[r * full->ne[0]], s.k, r % 2 ? -1.0f : 1.0f);
            }
        }
        ggml_backend_tensor_set(full, x_values.data(), 0, ggml_nbytes(full));
        if (ids != nullptr) {
            routing.resize(s.n_used * s.n_tokens);
            for (int64_t token = 0; token < s.n_tokens; token++) {
                std::vector<int32_t> experts(s.n_experts);
                for (int32_t e = 0; e < s.n_experts; e++) {
                    experts[e] = e;
                }
                std::shuffle(experts.begin(), experts.end(), rng);
                if (s.routing == "one") {
                    std::sort(experts.begin(), experts.end());
                }
                if (s.routing == "lonely") {
                    experts[0] = (int32_t) std::min(token, s.n_experts - 1);
                }
                std::copy(experts.begin(), experts.begin() + s.n_used, &routing[token * s.n_used]);
            }
            ggml_backend_tensor_set(ids, routing.data(), 0, ggml_nbytes(ids));
        }
    }

    Shape                 s;
    std::mt19937          rng;
    ggml_backend_t        backend;
    ggml_context *        weights_ctx = nullptr;
    ggml_context *        ctx         = nullptr;
    ggml_tensor *         weights     = nullptr;
    ggml_tensor *         full        = nullptr;
    ggml_tensor *         acts        = nullptr;
    ggml_tensor *         ids         = nullptr;
    ggml_tensor *         result      = nullptr;
    ggml_cgraph *         graph       = nullptr;
    ggml_backend_buffer_t repacked    = nullptr;
    ApartBuffers          buffers;
    std::vector<float>    w_values, x_values;
    std::vector<int32_t>  routing;
};

static void check(const Shape & s) {
    Case                     product(s);
    const std::vector<float> one   = product.compute(1);
    const double             error = product.nmse(one);
    const std::string        name  = name_of(s);
    expect(error <= EXACT_LIMIT, name + text(": NMSE against float64 %g", error));  // false for NaN too
    for (const int n_threads : thread_counts()) {
        const std::vector<float> many = product.compute(n_threads);
        expect(memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0,
               name + text(": not the bits of one thread with %d", n_threads));
    }
}

// A column has the same bits for any number of columns. Quantized weights need no mark for that.
static void check_columns(Shape s) {
    s.n_tokens                   = 33;
    const std::vector<float> all = Case(s).compute(1);
    for (const int64_t n : { 1, 2, 3, 4, 5, 7, 17 }) {
        s.n_tokens                    = n;
        const std::vector<float> some = Case(s).compute(2);
        expect(memcmp(all.data(), some.data(), some.size() * sizeof(float)) == 0,
               name_of(s) + ": not the bits of 33 columns");
    }
}

struct Kind {
    ggml_type type;
    bool      repack;
    int64_t   block;  // K is a multiple of it
};

// A value that is not finite reaches the results of its column, all of them, and no others.
static void check_not_finite(const Kind & kind) {
    Shape s;
    s.type   = kind.type;
    s.repack = kind.repack;
    s.k      = 768;
    s.n_rows = kind.repack ? 40 : 47;
    for (const int64_t n : { 1, 3, 40 }) {
        s.n_tokens                     = n;
        const std::vector<float> whole = Case(s).compute(1);
        for (const float value : { NAN, INFINITY, -INFINITY }) {
            Case broken(s);
            broken.set_value(n / 2, value);
            const std::vector<float> found    = broken.compute(2);
            int                      n_finite = 0, n_other = 0;
            for (size_t i = 0; i < found.size(); i++) {
                if ((int64_t) i / s.n_rows == n / 2) {
                    n_finite += std::isfinite(found[i]);
                } else {
                    n_other += memcmp(&found[i], &whole[i], sizeof(float)) != 0;
                }
            }
            expect(n_finite == 0 && n_other == 0,
                   name_of(s) + text(": %g in a column: %d finite results, %d other results in other columns", value,
                                     n_finite, n_other));
        }
    }
}

// Every thread has its own rows then.
static void check_numa(Shape s) {
    const std::vector<float> expected = Case(s).compute(1);
    std::vector<int>         counts   = thread_counts();
    counts.push_back(1);
    for (const int n_threads : counts) {
        numa                           = true;
        numa_asked                     = 0;
        const std::vector<float> found = Case(s).compute(n_threads);
        numa                           = false;
        expect(numa_asked > 0, name_of(s) + ": ggml_is_numa was not replaced");
        expect(memcmp(expected.data(), found.data(), found.size() * sizeof(float)) == 0,
               name_of(s) + text(": other bits with NUMA and %d threads", n_threads));
    }
}

static const Kind kinds[] = {
    { GGML_TYPE_Q4_0, false, 32 },  { GGML_TYPE_Q4_0, true, 32 },    { GGML_TYPE_Q5_0, false, 32 },
    { GGML_TYPE_Q8_0, false, 32 },  { GGML_TYPE_IQ4_NL, false, 32 }, { GGML_TYPE_IQ4_NL, true, 32 },
    { GGML_TYPE_MXFP4, false, 32 }, { GGML_TYPE_MXFP4, true, 32 },   { GGML_TYPE_Q2_K, false, 256 },
    { GGML_TYPE_Q2_K, true, 256 },  { GGML_TYPE_Q3_K, false, 256 },  { GGML_TYPE_Q4_K, false, 256 },
    { GGML_TYPE_Q5_K, false, 256 }, { GGML_TYPE_Q6_K, false, 256 },  { GGML_TYPE_IQ4_XS, false, 256 },
    { GGML_TYPE_BF16, false, 32 },  { GGML_TYPE_F16, false, 32 },
};

static std::vector<Shape> shapes_of(const Kind & kind) {
    std::vector<Shape> shapes;
    Shape              base;
    base.type      = kind.type;
    base.repack    = kind.repack;
    base.n_tokens  = kind.type == GGML_TYPE_BF16 || kind.type == GGML_TYPE_F16 ? 40 : 16;  // upstream's < 20
    const auto add = [&](auto change) {
        Shape s = base;
        change(s);
        shapes.push_back(s);
    };
    for (const int64_t blocks :
         { (int64_t) 1, (int64_t) 3, (int64_t) 4, (int64_t) 6, (int64_t) 9, (int64_t) 12, 2304 / kind.block }) {
        const int64_t k = blocks * kind.block;
        add([&](Shape & s) { s.k = k; });
        add([&](Shape & s) { s.k = k, s.n_tokens = 1; });
        add([&](Shape & s) { s.k = k, s.n_tokens = 3; });
    }
    for (const int64_t k : { 3072, 3328, 4096, 4352 }) {  // long rows
        add([&](Shape & s) { s.k = k, s.n_rows = 24, s.n_tokens = 1; });
    }
    for (const int64_t n : { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 17, 33, 129, 300 }) {
        add([&](Shape & s) { s.n_tokens = n; });
    }
    for (const int64_t n : { 8, 16, 24, 40, 136 }) {
        add([&](Shape & s) { s.n_rows = n; });
    }
    for (const char * values : { "zeros", "huge", "tiny" }) {
        add([&](Shape & s) { s.values = values; });
        add([&](Shape & s) { s.values = values, s.n_tokens = 2; });
    }
    if (kind.type == GGML_TYPE_MXFP4) {  // its smallest scales are subnormal
        for (const int64_t n : { 2, 16 }) {
            add([&](Shape & s) { s.values = "faint", s.n_tokens = n; });
        }
    }
    for (const int64_t blocks : { 9, 13 }) {  // more than two panels, the last one often not full
        add([&](Shape & s) { s.k = blocks * kind.block, s.n_tokens = 40; });
    }
    // many threads divide rows, columns, and a row of activations; the last result is streamed
    for (const int64_t n : { 1, 4, 300 }) {
        add([&](Shape & s) { s.n_rows = 912, s.n_tokens = n; });
    }
    for (const int64_t n : { 1, 3 }) {  // few threads have tasks of more rows
        add([&](Shape & s) { s.n_rows = 4104, s.n_tokens = n; });
    }
    add([&](Shape & s) { s.strided = true; });
    add([&](Shape & s) { s.n_planes = 3; });
    if (!kind.repack) {
        add([&](Shape & s) { s.n_planes = s.n_weights = 3; });
        add([&](Shape & s) { s.n_planes = 6, s.n_weights = 2; });
        for (const int64_t n : { 1, 3, 9, 33 }) {
            add([&](Shape & s) { s.n_rows = n; });
            add([&](Shape & s) { s.n_rows = n, s.n_tokens = 1; });
            add([&](Shape & s) { s.n_rows = n, s.n_tokens = 4; });
        }
    }
    base.n_experts = 8;
    for (const int64_t n : { 1, 7, 8, 15, 17, 40, 400 }) {
        add([&](Shape & s) { s.n_tokens = n; });
        add([&](Shape & s) { s.n_tokens = n, s.broadcast = false; });
    }
    add([&](Shape & s) { s.n_rows = 272, s.n_tokens = 300, s.n_used = 6; });  // several threads sort; streamed
    add([&](Shape & s) { s.routing = "one"; });
    add([&](Shape & s) { s.routing = "lonely", s.n_tokens = 40, s.n_used = 1; });
    add([&](Shape & s) { s.n_experts = 64, s.n_used = 6, s.n_tokens = 64; });
    add([&](Shape & s) { s.n_experts = 3, s.n_used = 3, s.broadcast = false, s.values = "zeros"; });
    add([&](Shape & s) { s.strided = true, s.broadcast = false; });
    for (const char * values : { "zeros", "huge", "tiny" }) {
        add([&](Shape & s) { s.values = values; });
    }
    return shapes;
}

// What every run checks: the largest sums, and few rows and columns of slices of 256 values and a rest; so many columns that
// tile registers multiply all types that they can.
static std::vector<Shape> shapes_at_limits(const Kind & kind) {
    std::vector<Shape> shapes;
    Shape              base;
    base.type   = kind.type;
    base.repack = kind.repack;
    for (const int64_t n : { 1, 2, 3, 11, 16, 35 }) {
        base.n_tokens = n;
        base.values   = "full";
        shapes.push_back(base);
        Shape rest  = base;
        rest.values = "normal";
        rest.k      = kind.block * 9;
        rest.n_rows = kind.repack ? 8 : n >= 16 ? 19 : 3;
        shapes.push_back(rest);
    }
    return shapes;
}

static void check_columns_of(const Kind & kind) {
    Shape base;
    base.type      = kind.type;
    base.repack    = kind.repack;
    base.routing   = "one";
    base.n_rows    = kind.repack ? 40 : 47;
    base.invariant = !ggml_is_quantized(kind.type);
    for (const int64_t k : { kind.block * 3, (int64_t) 7936 }) {  // 31 super blocks
        base.k = k;
        check_columns(base);
    }
    base.k         = 768;
    base.n_experts = 3;
    check_columns(base);
}

// Whether llama.cpp would put such a weight into a repack buffer, which is a second copy of it.
static bool is_copied(ggml_type type, bool experts) {
    ggml_context *        ctx    = ggml_init({ 1 << 16, nullptr, true });
    ggml_tensor *         weight = ggml_new_tensor_3d(ctx, type, 512, 64, experts ? 4 : 1);
    ggml_tensor *         x      = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 512, 1, 1);
    ggml_tensor *         chosen = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, 1);
    ggml_tensor *         op     = experts ? ggml_mul_mat_id(ctx, weight, x, chosen) : ggml_mul_mat(ctx, weight, x);
    ggml_backend_buffer_t empty  = ggml_backend_buft_alloc_buffer(repack_buffer_type(), 0);
    weight->buffer               = empty;
    const bool copied            = ggml_backend_dev_supports_op(ggml_backend_reg_dev_get(cpu_registry(), 0), op);
    ggml_backend_buffer_free(empty);
    ggml_free(ctx);
    return copied;
}

// On request, weights are copied with NEON if upstream multiplies them interleaved (types of 32 values). Without a request
// only Q4_0 and Q8_0 are, without i8mm, and no experts. With AVX-512 weights are copied if the kernels multiply them
// interleaved and copies are requested, else not.
static void check_copies(const char * setting, bool requested) {
    setenv("KIMI_REPACK", setting, 1);
    const std::set<ggml_type> with_neon = { GGML_TYPE_Q4_0, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL, GGML_TYPE_MXFP4 };
    const char *              i8mm      = getenv("KIMI_I8MM");  // only our sources may have it (share_upstreams)
    const bool                has_i8mm  = i8mm != nullptr && *i8mm == '1';
    const std::set<ggml_type> unasked =
        has_i8mm ? std::set<ggml_type>() : std::set<ggml_type>{ GGML_TYPE_Q4_0, GGML_TYPE_Q8_0 };
    for (const Kind & kind : kinds) {
        if (kind.repack) {
            continue;
        }
        const bool ours =
            std::any_of(std::begin(kinds), std::end(kinds), [&](auto k) { return k.type == kind.type && k.repack; });
        for (const bool experts : { false, true }) {
            const bool with_dots =
                requested ? with_neon.count(kind.type) > 0 : !experts && unasked.count(kind.type) > 0;
            const bool faster = cpu_has("DOTPROD") ? with_dots : cpu_has("AVX512_VNNI") && ours && requested;
            expect(is_copied(kind.type, experts) == faster,
                   std::string(ggml_type_name(kind.type)) + (experts ? " experts" : "") + ": copied or not");
        }
    }
}

int main() {
    static bool warned = false;
    ggml_log_set([](ggml_log_level, const char * text, void *) { warned = warned || strstr(text, "KIMI_REPACK=yes"); },
                 nullptr);  // suppresses one line per repacked tensor
    for (const Kind & kind : kinds) {
        if (kind.repack && !cpu_has("AVX512_VNNI")) {
            continue;  // upstream's matmul computes interleaved rows
        }
        for (const Shape & shape : shapes_of(kind)) {
            if (chosen()) {
                check(shape);
            }
        }
        for (const Shape & shape : shapes_at_limits(kind)) {
            check(shape);
        }
        if (chosen()) {
            check_columns_of(kind);
        }
        if (chosen() && (cpu_has("AVX2") || cpu_has("DOTPROD"))) {  // else upstream's matmul
            check_not_finite(kind);
        }
    }
    if (chosen()) {
        check_columns_of({ GGML_TYPE_F32, false, 32 });
    }
    if ((cpu_has("AVX2") || cpu_has("DOTPROD")) && repack_buffer_type() != nullptr) {
        check_copies("0", false);
        check_copies("1", true);
        expect(!warned, "0 and 1 are what is expected");
        check_copies("yes", false);
        expect(warned || !cpu_has("AVX512_VNNI"), "other values are logged where copies could be requested");
        unsetenv("KIMI_REPACK");
    }
    Shape large;
    large.type = GGML_TYPE_Q8_0;
    for (const int64_t n_experts : { 0, 8 }) {
        for (const int64_t n_tokens : { 1, 300 }) {
            // of 8 experts and 300 tokens, the result is large: of 528 rows it is streamed, rows of 520 do not begin at lines
            for (const int64_t n_rows : { 520, 528 }) {
                large.n_experts = n_experts;
                large.n_tokens  = n_tokens;
                large.n_rows    = n_rows;
                if (chosen()) {
                    check_numa(large);
                }
            }
        }
    }
    return report();
}
