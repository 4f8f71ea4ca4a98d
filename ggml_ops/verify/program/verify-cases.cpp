#include "verify-cases.h"

#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"
#include "ggml-latent-attn.h"
#include "ggml-op-marks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// Nearly normal: sums of four uniform values. The standard library's generators take longer than the checks.
Floats Inputs::normal(size_t n, float mean, float deviation) {
    Floats values(n);
    for (float & value : values) {
        state              = state * 6364136223846793005ull + 1442695040888963407ull;
        const uint64_t x   = state ^ state >> 29;
        const int64_t  sum = (x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48);
        value              = mean + deviation * (float) (sum - 2 * 0xffff) * (1.7320508f / 0xffff);
    }
    return values;
}

ggml_tensor * Inputs::tensor(ggml_type type, Shape shape, const Floats & values) {
    ggml_tensor * t = ggml_new_tensor(ctx, type, 4, shape.data());
    GGML_ASSERT(ggml_nelements(t) == (int64_t) values.size());
    std::vector<char> bytes(ggml_nbytes(t));
    if (type == GGML_TYPE_F32) {
        memcpy(bytes.data(), values.data(), bytes.size());
    } else {
        ggml_quantize_chunk(type, values.data(), bytes.data(), 0, ggml_nrows(t), t->ne[0], nullptr);
    }
    inputs.push_back({ t, bytes });
    return t;
}

ggml_tensor * Inputs::repeated(ggml_type type, Shape shape, const Floats & rows) {
    const int64_t     n_rows = rows.size() / shape[0];
    std::vector<char> once(n_rows * ggml_row_size(type, shape[0]));
    ggml_quantize_chunk(type, rows.data(), once.data(), 0, n_rows, shape[0], nullptr);
    ggml_tensor *     t = ggml_new_tensor(ctx, type, 4, shape.data());
    std::vector<char> bytes(ggml_nbytes(t));
    for (size_t i = 0; i < bytes.size(); i += once.size()) {
        std::copy_n(once.begin(), std::min(once.size(), bytes.size() - i), bytes.begin() + i);
    }
    inputs.push_back({ t, bytes });
    return t;
}

ggml_tensor * Inputs::indices(const std::vector<int32_t> & values) {
    ggml_tensor * t    = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, values.size());
    const char *  data = (const char *) values.data();
    inputs.push_back({ t, { data, data + ggml_nbytes(t) } });
    return t;
}

void Inputs::write() const {
    for (const Input & input : inputs) {
        ggml_backend_tensor_set(input.tensor, input.bytes.data(), 0, input.bytes.size());
    }
}

static Range whole(const ggml_tensor * t) {
    return { t, 0, ggml_nelements(t), 0, 1 };
}

static std::string count(int64_t n, const std::string & one, const std::string & many) {
    return std::to_string(n) + " " + (n == 1 ? one : many);
}

// KDA

struct KdaShape {
    int64_t head_size;
    int64_t n_tokens;
    int64_t n_seqs;
    int64_t n_snapshots;
    bool    moved;  // sequences read rows that others write; the last one starts from zero, its row contains NaN
    bool    extra;  // states of sequences outside the batch move too
    int64_t n_heads = 2;
    int64_t slot    = 0;  // the snapshot that the sequences continue, as after a rollback

    int64_t channels() const { return head_size * n_heads; }

    int64_t n_rows() const { return n_tokens * n_seqs; }

    int64_t n_cells() const { return n_seqs + 2; }

    int64_t n_slots() const { return std::min(n_tokens + 1, n_snapshots); }

    int32_t zero_row() const { return moved ? n_cells() - 1 : -1; }

    std::vector<int32_t> rows() const {
        std::vector<int32_t> rows(n_seqs);
        for (int64_t s = 0; s < n_seqs; ++s) {
            rows[s] = (moved ? n_seqs - 1 - s : s) + slot * n_cells();
        }
        if (moved) {
            rows.back() = zero_row();
        }
        return rows;
    }
};

static std::string name_of(const KdaShape & n) {
    return count(n.n_tokens, "token", "tokens") + ", " + count(n.n_seqs, "sequence", "sequences") + ", head size " +
           std::to_string(n.head_size) + (n.n_heads > 2 ? ", " + count(n.n_heads, "head", "heads") : "") +
           (n.n_snapshots > 1 ? ", snapshots" : "") + (n.slot > 0 ? ", rolled back" : "") + (n.moved ? ", moved" : "") +
           (n.extra ? ", others moved" : "");
}

static ggml_tensor * make_cache(Inputs & in, const KdaShape & n, int64_t state, float deviation) {
    Floats values = in.normal(state * n.n_cells() * n.n_snapshots, 0, deviation);
    if (n.moved) {
        std::fill_n(values.begin() + n.zero_row() * state, state, NAN);
    }
    return in.tensor(GGML_TYPE_F32, { state, n.n_cells() * n.n_snapshots, 1, 1 }, values);
}

// The nodes that llama.cpp adds after a KDA operator (llama-kda.cpp). Each token has n_kinds times n.channels() results,
// and each row of the cache has n_kinds parts. The kinds are compared separately, because they differ in size: q is about
// 1/170 of v.
static Built with_states(Inputs & in, const KdaShape & n, ggml_tensor * op, ggml_tensor * cache, int64_t n_kinds) {
    const int64_t state = cache->ne[0];
    const size_t  row   = cache->nb[1];
    const int64_t width = n_kinds * n.channels();
    const int64_t n_out = width * n.n_rows();
    Built         built = { { op }, {}, { { op, n_out, state * n.n_seqs * n.n_slots(), 0, 1 } } };
    for (int64_t kind = 0; kind < n_kinds; ++kind) {
        built.results.push_back({ op, kind * n.channels(), n.channels(), width, n.n_rows() });
        built.results.push_back({ cache, kind * state / n_kinds, state / n_kinds, state, cache->ne[1] });
    }
    if (n.extra) {
        if (n.moved) {
            ggml_tensor * zero = ggml_view_1d(in.ctx, cache, state, n.zero_row() * row);
            built.nodes.push_back(ggml_fill_inplace(in.ctx, zero, 0.0f));
        }
        ggml_tensor * from = ggml_get_rows(in.ctx, cache, in.indices({ (int32_t) n.n_seqs + 1 }));
        built.nodes.push_back(ggml_cpy(in.ctx, from, ggml_view_2d(in.ctx, cache, state, 1, row, n.n_seqs * row)));
    }
    ggml_tensor * from =
        ggml_view_3d(in.ctx, op, state, n.n_seqs, n.n_slots(), row, row * n.n_seqs, n_out * sizeof(float));
    ggml_tensor * to = ggml_view_3d(in.ctx, cache, state, n.n_seqs, n.n_slots(), row, row * n.n_cells(), 0);
    built.nodes.push_back(ggml_cpy(in.ctx, from, to));
    return built;
}

static Built build_conv(Inputs & in, const KdaShape & n) {
    const int64_t channels = n.channels();
    ggml_tensor * src[GGML_KDA_CONV_N_SRC];
    for (int i = 0; i < 3; ++i) {
        const bool small = i == GGML_KDA_CONV_K && n.n_tokens % 2 == 0;  // so that eps matters
        Floats     x     = in.normal(channels * n.n_rows(), 0, small ? 1e-3f : 2.0f);
        std::fill_n(x.begin(), n.head_size, 0.0f);  // a head that is zero has no norm
        src[GGML_KDA_CONV_Q + i]  = in.tensor(GGML_TYPE_F32, { channels, n.n_tokens, n.n_seqs, 1 }, x);
        src[GGML_KDA_CONV_WQ + i] = in.tensor(GGML_TYPE_F32, { 4, 1, channels, 1 }, in.normal(4 * channels, 0, 0.5f));
    }
    ggml_tensor * cache      = make_cache(in, n, 9 * channels, 1);
    src[GGML_KDA_CONV_CACHE] = cache;
    src[GGML_KDA_CONV_ROWS]  = in.indices(n.rows());
    ggml_tensor * op =
        ggml_kda_conv(in.ctx, src, { (int32_t) n.head_size, (int32_t) n.n_snapshots, n.zero_row(), 1e-6f });
    return with_states(in, n, op, cache, 3);
}

enum class Gates { ordinary, strong, extreme, open, parallel, bounded };

static const char * name_of(Gates gates) {
    static const char * const names[] = { "ordinary gates", "strong gates",  "log-gates down to -700",
                                          "open gates",     "parallel keys", "bounded gates" };
    return names[(int) gates];
}

// q, k and v of each token: q and k have norm 1, q is scaled.
static Floats make_qkv(Inputs & in, const KdaShape & n, bool parallel) {
    const int64_t size   = n.head_size;
    Floats        values = in.normal(3 * n.channels() * n.n_rows());
    const Floats  common = in.normal(size);
    for (int64_t r = 0; r < 3 * n.n_heads * n.n_rows(); ++r) {
        const int64_t kind = r / n.n_heads % 3;
        float *       x    = values.data() + r * size;
        double        sum  = 0;
        for (int64_t i = 0; i < size; ++i) {
            x[i] = parallel && kind == 1 ? common[i] + 1e-3f * x[i] : x[i];
            sum += (double) x[i] * x[i];
        }
        const double scale = kind == 0 ? 1 / std::sqrt(sum * size) : kind == 1 ? 1 / std::sqrt(sum) : 1;
        for (int64_t i = 0; i < size; ++i) {
            x[i] = (float) (x[i] * scale);
        }
    }
    return values;
}

static Floats make_f(Inputs & in, size_t n, Gates gates) {
    switch (gates) {
    case Gates::strong:
        return in.normal(n, 10, 10);
    case Gates::extreme:
        return in.normal(n, 0, 40);
    case Gates::open:
        return in.normal(n, -12, 2);
    default:
        return in.normal(n, 0, 2);
    }
}

static Built build_scan(Inputs & in, const KdaShape & n, Gates gates) {
    const int64_t size = n.head_size, heads = n.n_heads, channels = n.channels();
    Floats        a(heads);
    for (int64_t h = 0; h < heads; ++h) {
        a[h] = gates == Gates::extreme ? -7.0f : -0.5f - h;
    }
    const auto    f32  = [&](Shape shape, const Floats & x) { return in.tensor(GGML_TYPE_F32, shape, x); };
    const Shape   each = { size, heads, n.n_tokens, n.n_seqs };
    ggml_tensor * src[GGML_KDA_SCAN_N_SRC];
    src[GGML_KDA_SCAN_QKV] = f32({ size, 3 * heads, n.n_tokens, n.n_seqs }, make_qkv(in, n, gates == Gates::parallel));
    src[GGML_KDA_SCAN_F]   = f32(each, make_f(in, channels * n.n_rows(), gates));
    src[GGML_KDA_SCAN_DT_BIAS] = f32({ channels, 1, 1, 1 }, in.normal(channels, -2, 1));
    src[GGML_KDA_SCAN_A]       = f32({ 1, heads, 1, 1 }, a);
    src[GGML_KDA_SCAN_BETA]    = f32({ heads, n.n_tokens, n.n_seqs, 1 }, in.normal(heads * n.n_rows(), 0, 4));
    src[GGML_KDA_SCAN_GATE]    = f32(each, in.normal(channels * n.n_rows()));
    src[GGML_KDA_SCAN_NORM]    = f32({ size, 1, 1, 1 }, in.normal(size, 1, 0.2f));
    ggml_tensor * cache        = make_cache(in, n, size * channels, 0.3f);
    src[GGML_KDA_SCAN_CACHE]   = cache;
    src[GGML_KDA_SCAN_ROWS]    = in.indices(n.rows());
    const float   lower_bound  = gates == Gates::bounded ? -5.0f : -INFINITY;
    ggml_tensor * op = ggml_kda_scan(in.ctx, src, { (int32_t) n.n_snapshots, n.zero_row(), 1e-5f, lower_bound });
    return with_states(in, n, op, cache, 1);
}

// Latent attention, with the sizes of the 48B

struct LatentShape {
    bool      absorbed;
    int64_t   n_queries;
    int64_t   n_keys;
    int64_t   n_heads;
    ggml_type type;
    float     spread;  // standard deviation of the scores
    bool      sparse;  // two of five keys are visible, and none of the first half
    int64_t   n_streams;
    bool exact = true;  // otherwise CUDA's kernels multiply one half per value; the absorbed one only where it is fast

    static constexpr int64_t n_nope = 128, n_rope = 64, n_latent = 512, n_value = 128;
    static constexpr int64_t n_cache = n_latent + n_rope;

    bool visible(int64_t stream, int64_t query, int64_t key) const {
        return sparse ? 2 * key >= n_keys && (query * 7 + key * 13) % 5 < 2
                      : key <= n_keys - n_queries - 20 * (stream + 1) + query;
    }
};

static std::string name_of(const LatentShape & s) {
    return count(s.n_queries, "query", "queries") + ", " + std::to_string(s.n_keys) + " keys, " +
           count(s.n_heads, "head", "heads") + ", " +
           (s.n_streams > 1 ? count(s.n_streams, "stream", "streams") + ", " : "") + ggml_type_name(s.type) +
           (s.spread > 1 ? ", steep" : "") + (s.sparse ? ", sparse" : "") + (s.exact ? "" : ", halves");
}

static Built build_latent(Inputs & in, const LatentShape & s) {
    ggml_context * ctx    = in.ctx;
    const int64_t  n_key  = s.absorbed ? LatentShape::n_cache : LatentShape::n_nope + LatentShape::n_rope;
    const float    scale  = s.spread / std::sqrt((float) n_key);
    const auto     random = [&](ggml_type type, Shape shape) {
        return in.tensor(type, shape, in.normal(shape[0] * shape[1] * shape[2] * shape[3]));
    };
    ggml_tensor * q = random(GGML_TYPE_F32, { n_key, s.n_heads, s.n_queries, s.n_streams });
    ggml_tensor * k = random(s.type, { LatentShape::n_cache, s.n_keys, 1, s.n_streams });
    Floats        visible;
    for (int64_t stream = 0; stream < s.n_streams; ++stream) {
        for (int64_t query = 0; query < s.n_queries; ++query) {
            for (int64_t key = 0; key < s.n_keys; ++key) {
                visible.push_back(s.visible(stream, query, key) ? 0.0f : -INFINITY);
            }
        }
    }
    ggml_tensor * mask = in.tensor(GGML_TYPE_F16, { s.n_keys, s.n_queries, 1, s.n_streams }, visible);
    q                  = ggml_permute(ctx, q, 0, 2, 1, 3);
    ggml_tensor * op;
    if (s.absorbed) {
        ggml_tensor * v =
            ggml_view_4d(ctx, k, LatentShape::n_latent, s.n_keys, 1, s.n_streams, k->nb[1], k->nb[2], k->nb[3], 0);
        op = ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0f, 0.0f);
        ggml_prec_set_acc(op, GGML_PREC_F32);
    } else {
        const int64_t n_latent = LatentShape::n_latent;
        const auto    weights  = [&](Shape shape, float deviation) {
            return in.tensor(GGML_TYPE_F16, shape, in.normal(shape[0] * shape[1] * shape[2], 0, deviation));
        };
        ggml_tensor * k_b = weights({ LatentShape::n_nope, n_latent, s.n_heads, 1 }, 1 / std::sqrt((float) n_latent));
        ggml_tensor * v_b = weights({ n_latent, LatentShape::n_value, s.n_heads, 1 }, 1 / std::sqrt((float) n_latent));
        op                = ggml_latent_attn(ctx, q, k, k_b, v_b, mask, scale);
    }
    if (s.exact) {
        ggml_op_set_mark(op, GGML_OP_MARK_EXACT);
    }
    return { { op }, { whole(op) }, {} };
}

// Fused nodes

struct RouterShape {
    int64_t n_experts;  // coprime to 37 and 11, so that all ranks and biases occur
    int64_t n_chosen;
    int64_t n_tokens;
    bool    saturated;  // the scores of many experts are 0 or 1, for the first token all are 0

    // The choice must not depend on rounding: scores differ by more than 1e-4.
    float logit(int64_t token, int64_t expert) const {
        const int64_t rank = (expert * 37 + token * 53) % n_experts;
        if (saturated) {
            return token == 0 ? -100.0f : 100.0f * (rank % 3 - 1);
        }
        return 8.0f * rank / n_experts - 4;
    }

    float bias(int64_t expert) const {
        return saturated ? 0.4f * (expert * 11 % n_experts) / n_experts : 2.0f * (expert % 3);
    }
};

static std::string name_of(const RouterShape & n) {
    return "router, " + std::to_string(n.n_chosen) + " of " + std::to_string(n.n_experts) + " experts, " +
           count(n.n_tokens, "token", "tokens") + (n.saturated ? ", saturated" : "");
}

// The nodes that llama.cpp builds for sigmoid scores with a selection bias (ggml-router-nodes.h).
static Built build_router(Inputs & in, const RouterShape & n) {
    ggml_context * ctx = in.ctx;
    Floats         logits(n.n_experts * n.n_tokens), bias(n.n_experts);
    for (int64_t e = 0; e < n.n_experts; ++e) {
        bias[e] = n.bias(e);
        for (int64_t t = 0; t < n.n_tokens; ++t) {
            logits[t * n.n_experts + e] = n.logit(t, e);
        }
    }
    ggml_tensor * scores = ggml_sigmoid(ctx, in.tensor(GGML_TYPE_F32, { n.n_experts, n.n_tokens, 1, 1 }, logits));
    ggml_tensor * biased = ggml_add(ctx, scores, in.tensor(GGML_TYPE_F32, { n.n_experts, 1, 1, 1 }, bias));
    ggml_tensor * chosen = ggml_argsort_top_k(ctx, biased, n.n_chosen);
    ggml_tensor * w      = ggml_get_rows(ctx, ggml_reshape_3d(ctx, scores, 1, n.n_experts, n.n_tokens), chosen);
    w                    = ggml_reshape_2d(ctx, w, n.n_chosen, n.n_tokens);
    w                    = ggml_div(ctx, w, ggml_clamp(ctx, ggml_sum_rows(ctx, w), 6.103515625e-5f, INFINITY));
    w                    = ggml_scale(ctx, ggml_reshape_3d(ctx, w, 1, n.n_chosen, n.n_tokens), 2.446f);
    ggml_tensor * ids    = ggml_cast(ctx, chosen, GGML_TYPE_F32);
    return { { w, ids }, { whole(w), whole(ids) }, {} };
}

struct NormShape {
    int64_t n_values;
    int64_t n_tokens;
    int     n_adds;
    float   deviation;
};

static std::string name_of(const NormShape & n) {
    return "residual and norm, " + std::to_string(n.n_values) + " values, " + count(n.n_tokens, "token", "tokens") +
           ", " + count(n.n_adds, "sum", "sums");
}

static Built build_norm(Inputs & in, const NormShape & n) {
    const auto rows = [&] {
        return in.tensor(GGML_TYPE_F32, { n.n_values, n.n_tokens, 1, 1 },
                         in.normal(n.n_values * n.n_tokens, 0, n.deviation));
    };
    ggml_tensor * sum = rows();
    for (int i = 0; i < n.n_adds; ++i) {
        sum = ggml_add(in.ctx, sum, rows());
    }
    ggml_tensor * weights = in.tensor(GGML_TYPE_F32, { n.n_values, 1, 1, 1 }, in.normal(n.n_values, 1, 0.2f));
    ggml_tensor * norm    = ggml_mul(in.ctx, ggml_rms_norm(in.ctx, sum, 1e-5f), weights);
    return { { norm }, { whole(sum), whole(norm) }, {} };
}

// Whole numbers, of which one in each block of 32 is 127 or -127: quantizing them to 8 bits changes nothing, in blocks of
// 32 or of 256. So device and CPU multiply the same numbers.
static ggml_tensor * make_columns(Inputs & in, int64_t n, int64_t n_columns, int64_t n_batches) {
    Floats values = in.normal(n * n_columns * n_batches, 0, 20);
    for (size_t i = 0; i < values.size(); ++i) {
        values[i] = i % 32 == 5 ? (i % 3 ? 127.0f : -127.0f) : std::round(values[i]);
    }
    return in.tensor(GGML_TYPE_F32, { n, n_columns, n_batches, 1 }, values);
}

// The norm of a token, and a matmul for which CUDA quantizes it in the norm's kernel. All values of the sum are 1 or -1, so
// the norm is whole numbers times almost 1.
static Built build_norm_and_product(Inputs & in) {
    constexpr int64_t N      = 2304;
    Floats            halves = in.normal(N, 0, 1);
    for (float & x : halves) {
        x = x < 0 ? -0.5f : 0.5f;
    }
    const auto    row     = [&] { return in.tensor(GGML_TYPE_F32, { N, 1, 1, 1 }, halves); };
    ggml_tensor * sum     = ggml_add(in.ctx, row(), row());
    ggml_tensor * norm    = ggml_mul(in.ctx, ggml_rms_norm(in.ctx, sum, 1e-5f), make_columns(in, N, 1, 1));
    ggml_tensor * weights = in.repeated(GGML_TYPE_Q8_0, { N, 40, 1, 1 }, in.normal(N * 13, 0, 1));
    ggml_tensor * product = ggml_mul_mat(in.ctx, weights, norm);
    return { { product }, { whole(sum), whole(norm), whole(product) }, {} };
}

// Matmuls of one column

enum class Matvec { group, few_rows, many_rows, batch, experts, gated_experts, gated };

static std::string name_of(Matvec kind, ggml_type type) {
    static const char * const names[] = { "several matrices", "few rows",           "many rows", "a batch",
                                          "experts",          "experts with gates", "gates" };
    return std::string(ggml_type_name(type)) + ", " + names[(int) kind];
}

// CUDA's kernel accepts rows of up to 4096 values. Without a gate it needs at least 2048 rows, or rows of up to 2304 values
// (not Q2_K or Q3_K). Up to 132 multiprocessors, one warp computes rows of 768 values if there are many of them (also with
// gates), and two or four warps share the others. With experts, upstream's kernel needs multiples of four rows.
static Built build_matvec(Inputs & in, Matvec kind, ggml_type type) {
    constexpr int64_t N_DIFFERENT = 13;          // rows; the numbers of rows below are no multiples of it
    constexpr float   WEIGHT      = 1.0f / 256;  // so small that gates are neither open nor closed
    ggml_context *    ctx         = in.ctx;
    const auto        matrix      = [&](int64_t n_columns, int64_t n_rows, int64_t n = 1) {
        return in.repeated(type, { n_columns, n_rows, n, 1 }, in.normal(n_columns * N_DIFFERENT, 0, WEIGHT));
    };
    if (kind == Matvec::group) {
        ggml_tensor * a = matrix(512, 5);
        ggml_tensor * b = matrix(512, 2048);
        ggml_tensor * c = matrix(512, 7);
        ggml_tensor * x = make_columns(in, 512, 1, 1);
        a               = ggml_mul_mat(ctx, a, x);
        b               = ggml_mul_mat(ctx, b, x);
        c               = ggml_mul_mat(ctx, c, x);
        return { { a, b, c }, { whole(a), whole(b), whole(c) }, {} };
    }
    const bool    has_ids   = kind == Matvec::experts || kind == Matvec::gated_experts;
    const bool    has_gate  = kind == Matvec::gated_experts || kind == Matvec::gated;
    const int64_t n_columns = kind == Matvec::gated || kind == Matvec::few_rows ? 2304 : 768;
    const int64_t n_rows    = kind == Matvec::gated           ? 40
                              : kind == Matvec::few_rows      ? 9
                              : kind == Matvec::many_rows     ? 8000
                              : kind == Matvec::gated_experts ? 2700
                                                              : 704;
    const int64_t n         = kind == Matvec::experts ? 5 : has_ids || kind == Matvec::batch ? 3 : 1;
    ggml_tensor * up        = matrix(n_columns, n_rows, n);
    ggml_tensor * gate      = has_gate ? matrix(n_columns, n_rows, n) : nullptr;
    ggml_tensor * ids       = has_ids ? in.indices({ (int32_t) n - 1, 0, 1 }) : nullptr;
    ggml_tensor * x = make_columns(in, n_columns, kind == Matvec::experts ? 3 : 1, kind == Matvec::batch ? 2 * n : 1);
    const auto    multiply = [&](ggml_tensor * w) {
        return has_ids ? ggml_mul_mat_id(ctx, w, x, ids) : ggml_mul_mat(ctx, w, x);
    };
    ggml_tensor * out = has_gate ? ggml_swiglu_split(ctx, multiply(gate), multiply(up)) : multiply(up);
    return { { out }, { whole(out) }, {} };
}

static constexpr double BOUND           = 1e-7;
static constexpr double BOUND_QUANTIZED = 2e-5;
static constexpr double BOUND_HALVES    = 5e-6;  // CUDA's default for F16 and BF16 caches; upstream's is 5e-4

std::vector<Case> cases_of(ggml_verify_part part) {
    // with 64 tokens or more, CUDA computes in chunks; most devices have no kernels for some of the head sizes
    static const KdaShape kda[] = {
        { 128, 1, 1, 1, false, false },   { 128, 3, 3, 4, true, false },  { 128, 2, 2, 1, true, true },
        { 128, 4, 2, 4, false, true },    { 128, 40, 2, 4, true, false }, { 128, 133, 1, 1, false, false },
        { 128, 133, 1, 4, false, false }, { 64, 70, 2, 1, true, false },  { 32, 70, 1, 1, false, false },
        { 96, 5, 2, 4, true, false },     { 256, 5, 1, 1, false, false }, { 128, 3, 3, 4, true, false, 5, 2 },
    };
    std::vector<Case> cases;
    if (part == GGML_VERIFY_KDA_CONV || part == GGML_VERIFY_STATE_COPY) {
        for (const KdaShape & n : kda) {
            cases.push_back({ name_of(n), BOUND, [n](Inputs & in) { return build_conv(in, n); } });
        }
    }
    if (part == GGML_VERIFY_KDA_SCAN || part == GGML_VERIFY_STATE_COPY) {
        for (const KdaShape & n : kda) {
            const auto ordinary = Gates::ordinary;
            cases.push_back({ name_of(n), BOUND, [=](Inputs & in) { return build_scan(in, n, ordinary); } });
        }
    }
    if (part == GGML_VERIFY_KDA_SCAN) {
        for (const Gates gates : { Gates::strong, Gates::extreme, Gates::open, Gates::parallel, Gates::bounded }) {
            const KdaShape n = { 128, 100, 1, 1, true, false };
            cases.push_back(
                { name_of(n) + ", " + name_of(gates), BOUND, [=](Inputs & in) { return build_scan(in, n, gates); } });
        }
    }
    if (part == GGML_VERIFY_ABSORBED || part == GGML_VERIFY_LATENT_ATTN) {
        const bool absorbed = part == GGML_VERIFY_ABSORBED;
        for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            // CUDA needs multiples of 256 keys; Metal does not split up to 64
            const std::vector<LatentShape> shapes =
                absorbed ? std::vector<LatentShape>{ { true, 1, 512, 32, type, 1, false, 1 },
                                                     { true, 3, 256, 32, type, 4, true, 1 },
                                                     { true, 2, 64, 32, type, 1, false, 1 },
                                                     { true, 1, 256, 16, type, 1, false, 2 } }
                         : std::vector<LatentShape>{ { false, 70, 256, 2, type, 4, false, 1 },
                                                     { false, 40, 130, 3, type, 1, false, 2 } };
            for (const LatentShape & s : shapes) {
                cases.push_back({ name_of(s), ggml_is_quantized(type) ? BOUND_QUANTIZED : BOUND,
                                  [s](Inputs & in) { return build_latent(in, s); } });
                if (!absorbed && (type == GGML_TYPE_F16 || type == GGML_TYPE_BF16)) {
                    LatentShape halves = s;
                    halves.exact       = false;
                    cases.push_back(
                        { name_of(halves), BOUND_HALVES, [halves](Inputs & in) { return build_latent(in, halves); } });
                }
            }
        }
    }
    if (part == GGML_VERIFY_ABSORBED) {
        // Metal: one split of 128 keys; more splits than 32, of 128 keys
        for (const auto & [n_queries, n_keys] : { std::pair<int64_t, int64_t>{ 33, 80 }, { 1, 4352 } }) {
            const LatentShape s = { true, n_queries, n_keys, 32, GGML_TYPE_F16, 1, false, 1 };
            cases.push_back({ name_of(s), BOUND, [s](Inputs & in) { return build_latent(in, s); } });
        }
    }
    if (part == GGML_VERIFY_FUSED) {
        const RouterShape routers[] = {
            { 256, 8, 5, false }, { 64, 6, 40, false }, { 384, 8, 2, false }, { 256, 8, 3, true }
        };
        for (const RouterShape & n : routers) {
            cases.push_back({ name_of(n), BOUND, [n](Inputs & in) { return build_router(in, n); } });
        }
        // CUDA fuses one token and one sum
        const NormShape norms[] = { { 2304, 1, 1, 1 },   { 8192, 1, 1, 100 }, { 32, 1, 1, 1e-3f },
                                    { 2304, 7, 2, 100 }, { 36, 3, 1, 1e-3f }, { 8192, 2, 2, 1 } };
        for (const NormShape & n : norms) {
            cases.push_back({ name_of(n), BOUND, [n](Inputs & in) { return build_norm(in, n); } });
        }
        cases.push_back({ "norm and matmul of 1 token", BOUND, build_norm_and_product, true });
    }
    if (part == GGML_VERIFY_MATVEC) {
        for (const ggml_type type :
             { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_Q2_K,
               GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K }) {
            for (const Matvec kind : { Matvec::group, Matvec::few_rows, Matvec::many_rows, Matvec::batch,
                                       Matvec::experts, Matvec::gated_experts, Matvec::gated }) {
                cases.push_back(
                    { name_of(kind, type), BOUND, [=](Inputs & in) { return build_matvec(in, kind, type); }, true });
            }
        }
    }
    return cases;
}
