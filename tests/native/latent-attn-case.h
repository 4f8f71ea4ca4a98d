#pragma once

// One latent attention: its sources, built as in llama.cpp, its result from ggml's CPU backend, and its error against
// float64 on the exact values of cache and weights. Uses only ggml's public interface and looks up LATENT_ATTN by name,
// so that the same binary also runs with an upstream library.

#include "check.h"
#include "common/ggml-op-marks.h"
#include "cpu_backend.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-latent-attn.h"
#include "ggml.h"

#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

struct LatentShape {
    bool      expand    = false;  // from q to values as in the model; false: both in the latent space
    bool      plain     = false;  // the absorbed form disabled: upstream's paths
    bool      exact     = false;  // marked: the most accurate kernels
    int64_t   n_queries = 1;
    int64_t   n_keys    = 16384;
    int64_t   n_heads   = 32;
    int64_t   n_streams = 1;
    int64_t   n_latent  = 512;
    int64_t   n_rope    = 64;
    int64_t   n_nope    = 128;  // this and n_value: decompressed form only
    int64_t   n_value   = 128;
    ggml_type cache     = GGML_TYPE_F16;
    ggml_type weights   = GGML_TYPE_F16;
    // none, causal, mixed (two of five keys), blind (the first query sees nothing), slots (each group of four queries sees a
    // sixth of the keys, none of them the last third)
    std::string mask      = "causal";
    float       spread    = 1.0f;   // standard deviation of the scores
    float       query     = 1.0f;   // standard deviation of the values of q, compensated by the scale
    bool        poison    = false;  // cells that no query sees are NaN
    bool        ordered   = false;  // the node has the order of the keys, ...
    bool        backwards = false;  // ... of which the last one is in the first cell
    int64_t     ahead     = 0;      // last queries that are like none of a case without them
    float       first     = 1.0f;   // standard deviation of the values of the first key, and of the last; between
    float       last      = 1.0f;   // them it grows by a constant factor per key
    bool        alike     = false;  // these values are not random: all values of a key are its standard deviation
    // random; decompressed form only: loud (the first value of each head is 3000 times as large), common (all keys have the
    // same first latent value, 22, and v_b hardly reads it), massive (22 is the only latent value of the first key, and only
    // the first row of v_b reads it, which is quiet). common and massive: with F16 only
    std::string values   = "random";
    int64_t     period   = 0;      // keys from the second on repeat after as many; 0: they do not
    float       heavy    = 0.0f;   // added to the score of the first key
    float       shift    = 0.0f;   // absorbed form only: added to all scores, ...
    bool        rising   = false;  // ... twice for the first key, and less for each of those after it
    float       sink     = 0.0f;   // absorbed form only: added to the score of the first key, whose values are zeros
    int64_t     gap      = 0;      // values between the rows of q, and between those of the cache
    bool        one_mask = false;  // for all streams
    uint32_t    seed     = 1;

    LatentShape with(int64_t queries, int64_t keys) const {
        LatentShape other = *this;
        other.n_queries   = queries;
        other.n_keys      = keys;
        return other;
    }

    int64_t n_cache() const { return n_latent + n_rope; }

    int64_t n_key() const { return expand ? n_nope + n_rope : n_cache(); }

    int64_t n_out() const { return expand ? n_value : n_latent; }

    int64_t n_rows() const { return n_streams * n_queries * n_heads; }

    float deviation(int64_t key) const {
        return first * std::pow(last / first, (float) key / (float) std::max<int64_t>(1, n_keys - 1));
    }

    // Factor of a row of v_b.
    float loudness(int64_t row) const {
        return row % n_value != 0 ? 1.0f : values == "loud" ? 3000.0f : values == "massive" ? 0.1f : 1.0f;
    }

    int64_t cell(int64_t key) const { return backwards && key < n_keys ? n_keys - 1 - key : key; }

    bool visible(int64_t stream, int64_t query, int64_t key) const {
        if (mask == "mixed") {
            return (query * 7 + key * 13 + (one_mask ? 0 : stream)) % 5 < 2;
        }
        if (mask == "slots") {
            return key * 6 / n_keys == query / 4 % 4;
        }
        if (mask == "blind" && query == 0) {
            return false;
        }
        return mask == "none" || key <= n_keys - n_queries + query;
    }
};

inline std::string name_of(const LatentShape & s) {
    return text(
        "%s %s weights %s queries %d keys %d heads %d streams %d latent %d of %d mask %s spread %g query %g %s values "
        "%g to %g%s period %d heavy %g shift %g%s sink %g gap %d%s%s%s%s",
        s.expand ? "decompressed" : "absorbed", ggml_type_name(s.cache), ggml_type_name(s.weights), (int) s.n_queries,
        (int) s.n_keys, (int) s.n_heads, (int) s.n_streams, (int) s.n_out(), (int) s.n_latent, s.mask.c_str(), s.spread,
        s.query, s.values.c_str(), s.first, s.last, s.alike ? " alike" : "", (int) s.period, s.heavy, s.shift,
        s.rising ? " rising" : "", s.sink, (int) s.gap, s.one_mask ? " one mask" : "", s.poison ? " poisoned" : "",
        s.backwards ? " backwards"
        : s.ordered ? " ordered"
                    : "",
        s.exact ? " exact" : "");
}

// The bound of the NMSE against float64 on the dequantized values.
inline double limit_of(ggml_type cache) {
    return ggml_is_quantized(cache) ? 2e-5 : 1e-7;
}

// CUDA's kernels, by default, multiply one half per value of the expanded keys and values.
inline bool in_halves(const LatentShape & s) {
    return s.expand && !s.exact && (s.cache == GGML_TYPE_F16 || s.cache == GGML_TYPE_BF16);
}

// The same for CUDA's kernels.
inline double limit_on_cuda(const LatentShape & s) {
    return in_halves(s) ? 5e-6 : limit_of(s.cache);
}

inline ggml_type type_of(const std::string & name) {
    for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
        if (ggml_type_name((ggml_type) t) && name == ggml_type_name((ggml_type) t)) {
            return (ggml_type) t;
        }
    }
    fprintf(stderr, "%s: no such ggml type\n", name.c_str());
    exit(2);
}

class LatentCase {
  public:
    explicit LatentCase(const LatentShape & shape) : s(shape), backend(cpu_backend()), rng(shape.seed) {
        const ggml_init_params params = { 32 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
        ctx                           = ggml_init(params);
        build();
        buffers.allocate(ctx, backend);
        fill();
    }

    ~LatentCase() {
        ggml_free(ctx);
        ggml_backend_free(backend);
    }

    LatentCase(const LatentCase &)             = delete;
    LatentCase & operator=(const LatentCase &) = delete;

    void compute(int n_threads) {
        cpu_backend_use(backend, n_threads, false);
        ggml_backend_graph_compute(backend, graph);
    }

    // The operator's node with its sources in CPU memory; nmse() checks the data written to its result.
    ggml_tensor * node() const { return out; }

    ggml_cgraph * nodes() const { return graph; }

    std::vector<float> result() const {
        const float * data = (const float *) out->data;
        return std::vector<float>(data, data + ggml_nelements(out));
    }

    // Normalised mean square error over n_check of the rows, spread evenly, of their values from d0 on.
    double nmse(int64_t n_check, int64_t d0 = 0) const { return error_of(n_check, d0).total.nmse(); }

    // The largest NMSE of one of these rows.
    double worst_nmse(int64_t n_check) const { return error_of(n_check, 0).worst; }

    // Makes the weights of the first value of the first head NaN.
    void break_first_value() { memset(v_b->data, 0xff, v_b->nb[1]); }

    // Makes all values of a key NaN; or, in caches of floats, the last latent value -inf.
    void break_key(int64_t stream, int64_t key, bool infinite) {
        char * row = (char *) cache->data + stream * cache->nb[3] + s.cell(key) * cache->nb[1];
        if (infinite) {
            const float value = -INFINITY;
            char *      at    = row + (s.n_latent - 1) * ggml_type_size(s.cache);
            s.cache == GGML_TYPE_F32 ? (void) memcpy(at, &value, sizeof(value))
                                     : ggml_get_type_traits(s.cache)->from_float_ref(&value, at, 1);
        } else {
            memset(row, 0xff, cache->nb[1]);
        }
    }

    // Makes one value of a row of q NaN.
    void break_query(int64_t row) { ((float *) ((char *) q->data + row * q->nb[1]))[s.n_key() / 2] = NAN; }

  private:
    struct Squares {
        double error = 0.0;
        double power = 0.0;

        double nmse() const { return power == 0.0 ? error : error / power; }
    };

    struct RowErrors {
        Squares total;
        double  worst = 0.0;  // NMSE of a row
    };

    RowErrors error_of(int64_t n_check, int64_t d0) const {
        RowErrors found;
        n_check = std::min(n_check, s.n_rows());
        for (int64_t i = 0; i < n_check; ++i) {
            const int64_t             row  = n_check == 1 ? 0 : i * (s.n_rows() - 1) / (n_check - 1);
            const std::vector<double> want = oracle(row);
            const std::vector<double> got  = values_of(row);
            Squares                   of_row;
            for (int64_t d = d0; d < s.n_out(); ++d) {
                of_row.error += (got[d] - want[d]) * (got[d] - want[d]);
                of_row.power += want[d] * want[d];
            }
            found.total.error += of_row.error;
            found.total.power += of_row.power;
            found.worst = std::max(found.worst, of_row.nmse());
        }
        return found;
    }

    std::vector<double> values_of(int64_t row) const {
        const float * data = (const float *) out->data + row * s.n_out();
        return std::vector<double>(data, data + s.n_out());
    }

    LatentShape        s;
    ggml_backend_t     backend;
    std::mt19937       rng;
    ggml_context *     ctx;
    ggml_tensor *      q;
    ggml_tensor *      cache;
    ggml_tensor *      mask;
    ggml_tensor *      k_b;
    ggml_tensor *      v_b;
    ggml_tensor *      order;
    ggml_tensor *      out;
    ggml_cgraph *      graph;
    ApartBuffers       buffers;
    std::vector<float> q_f, cache_f, k_b_f, v_b_f;  // as float32, row by row

    float scale() const { return s.spread / s.query / std::sqrt((float) s.n_key()); }

    void build() {
        q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.n_key() + s.gap, s.n_heads, s.n_queries, s.n_streams);
        if (s.gap > 0) {
            q = ggml_view_4d(ctx, q, s.n_key(), s.n_heads, s.n_queries, s.n_streams, q->nb[1], q->nb[2], q->nb[3], 0);
        }
        ggml_tensor * q_perm = ggml_permute(ctx, q, 0, 2, 1, 3);
        // the cache is longer than n_keys
        cache = ggml_new_tensor_4d(ctx, s.cache, s.n_cache() + s.gap, s.n_keys + 256, 1, s.n_streams);
        k_b   = ggml_new_tensor_3d(ctx, s.weights, s.n_nope, s.n_latent, s.n_heads);
        v_b   = ggml_new_tensor_3d(ctx, s.weights, s.n_latent, s.n_value, s.n_heads);
        mask  = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.n_keys, s.n_queries, 1, s.one_mask ? 1 : s.n_streams);
        ggml_tensor * k = view(cache, s.n_cache());
        ggml_tensor * m = s.mask == "none" ? nullptr : mask;
        if (s.expand) {
            using make_t = ggml_tensor * (*)(ggml_context *, ggml_tensor *, ggml_tensor *, ggml_tensor *, ggml_tensor *,
                                             ggml_tensor *, float);
            const auto make = (make_t) dlsym(RTLD_DEFAULT, "ggml_latent_attn");
            if (!make) {
                fprintf(stderr, "this library has no ggml_latent_attn\n");
                exit(2);
            }
            out = make(ctx, q_perm, k, k_b, v_b, m, scale());
            mark_exact(out);
        } else {
            out = absorbed_form(q_perm, m);
        }
        order = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, s.n_keys, s.n_streams);
        if (s.ordered) {
            out->src[GGML_LATENT_ORDER_SRC] = order;
        }
        graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, out);
    }

    ggml_tensor * absorbed_form(ggml_tensor * q_perm, ggml_tensor * m) {
        ggml_tensor * k = view(cache, s.n_cache());
        ggml_tensor * a = ggml_flash_attn_ext(ctx, q_perm, k, view(k, s.n_latent), m, scale(), 0.0f, 0.0f);
        ggml_prec_set_acc(a, GGML_PREC_F32);
        if (s.plain) {
            ggml_op_set_mark(a, GGML_OP_MARK_UPSTREAM);
        }
        mark_exact(a);
        return a;
    }

    void mark_exact(ggml_tensor * node) const {
        if (s.exact) {
            ggml_op_set_mark(node, GGML_OP_MARK_EXACT);
        }
    }

    ggml_tensor * view(ggml_tensor * t, int64_t n) {
        return ggml_view_4d(ctx, t, n, s.n_keys, 1, s.n_streams, t->nb[1], t->nb[2], t->nb[3], 0);
    }

    // Fills a row with random values of the tensor's type, or with the deviation, and returns the rounded values in
    // `values`. last: the last value, NaN: one like the others.
    void fill_row(
        ggml_type type, char * row, int64_t n, float deviation, float * values, float last = NAN, bool alike = false) {
        std::normal_distribution<float> normal(0.0f, deviation);
        std::vector<float>              x(n);
        for (float & v : x) {
            v = alike ? deviation : normal(rng);
        }
        x.back() = std::isnan(last) ? x.back() : last;
        if (type == GGML_TYPE_F32) {
            memcpy(row, x.data(), n * sizeof(float));
            std::copy(x.begin(), x.end(), values);
        } else {
            ggml_quantize_chunk(type, x.data(), row, 0, 1, n, nullptr);
            ggml_get_type_traits(type)->to_float(row, values, n);
        }
    }

    // Changes a row of the cache, already filled with random values, for `values` and `period`.
    void change(char * row, float * values, int64_t stream, int64_t key) const {
        if (s.period > 0 && key > s.period) {
            const int64_t first = 1 + (key - 1) % s.period;
            memcpy(row, (char *) cache->data + stream * cache->nb[3] + s.cell(first) * cache->nb[1], cache->nb[1]);
            std::copy_n(values - (key - first) * s.n_cache(), s.n_cache(), values);
        }
        if (s.values == "massive" && key == 0) {
            memset(row, 0, s.n_latent * sizeof(ggml_fp16_t));
            std::fill_n(values, s.n_latent, 0.0f);
        }
        if (s.values == "common" || (s.values == "massive" && key == 0)) {
            set_half(row, values, 22.0f);
        }
    }

    // The first value of a row of halves, and the same as float32.
    static void set_half(void * row, float * values, float value) {
        const ggml_fp16_t half = ggml_fp32_to_fp16(value);
        memcpy(row, &half, sizeof(half));
        values[0] = ggml_fp16_to_fp32(half);
    }

    void fill() {
        q_f.resize(ggml_nelements(q));
        k_b_f.resize(ggml_nelements(k_b));
        v_b_f.resize(ggml_nelements(v_b));
        cache_f.resize(s.n_streams * s.n_keys * s.n_cache());
        const float deviation  = 1.0f / std::sqrt((float) s.n_nope);
        const float added      = s.sink != 0.0f ? s.sink : s.heavy != 0.0f ? s.heavy : s.shift;
        const auto  fill_query = [&](int64_t i) {
            fill_row(GGML_TYPE_F32, (char *) q->data + i * q->nb[1], q->ne[0], s.query, q_f.data() + i * q->ne[0],
                     added == 0.0f ? NAN : added / scale());
        };
        for (int64_t i = 0; !s.ordered && i < ggml_nrows(q); ++i) {
            fill_query(i);
        }
        for (auto [t, values] : { std::pair{ k_b, &k_b_f }, std::pair{ v_b, &v_b_f } }) {
            for (int64_t i = 0; i < ggml_nrows(t); ++i) {
                char *      row    = (char *) t->data + i * t->nb[1];
                float *     as_f   = values->data() + i * t->ne[0];
                const float factor = t == v_b ? s.loudness(i) : 1.0f;
                fill_row(t->type, row, t->ne[0], deviation * factor, as_f);
                if (t == v_b && (s.values == "common" || s.values == "massive")) {
                    set_half(row, as_f, s.values == "massive" && i % s.n_value == 0 ? 0.1f : 0.1f * as_f[0]);
                }
            }
        }
        std::vector<float> spare(s.n_cache());
        for (int64_t stream = 0; stream < s.n_streams; ++stream) {
            for (int64_t key = 0; key < cache->ne[1]; ++key) {
                char * row  = (char *) cache->data + stream * cache->nb[3] + s.cell(key) * cache->nb[1];
                bool   seen = false;
                for (int64_t i = 0; i < s.n_queries && key < s.n_keys; ++i) {
                    seen = seen || s.visible(stream, i, key);
                }
                const bool is_sink = s.sink != 0.0f && key == 0;
                fill_row(s.cache, row, s.n_cache(), is_sink ? 0.0f : s.deviation(std::min(key, s.n_keys - 1)),
                         key < s.n_keys ? &cache_f[(stream * s.n_keys + key) * s.n_cache()] : spare.data(),
                         s.sink != 0.0f    ? (float) is_sink
                         : s.heavy != 0.0f ? (float) (key == 0)
                         : s.shift == 0.0f ? NAN
                         : s.rising        ? 2.0f - (float) key / (float) s.n_keys
                                           : 1.0f,
                         s.alike);
                if (key < s.n_keys) {
                    change(row, &cache_f[(stream * s.n_keys + key) * s.n_cache()], stream, key);
                }
                if (s.poison && !seen) {
                    memset(row, 0xff,
                           cache->nb[1]);  // NaN in every float type, and as the scale of every quantized type
                }
            }
            for (int64_t i = 0; i < s.n_queries; ++i) {
                ggml_fp16_t * row =
                    (ggml_fp16_t *) ((char *) mask->data + i * mask->nb[1] + stream % mask->ne[3] * mask->nb[3]);
                for (int64_t key = 0; key < s.n_keys; ++key) {
                    row[s.cell(key)] = ggml_fp32_to_fp16(s.visible(stream, i, key) ? 0.0f : -INFINITY);
                }
            }
            for (int64_t key = 0; key < s.n_keys; ++key) {
                ((int32_t *) order->data)[stream * s.n_keys + key] = (int32_t) s.cell(key);
            }
        }
        // cases with an order compare runs of several queries with one: this query first, the same in both
        rng.seed(s.seed + 1);
        const int64_t n_before = ggml_nrows(q) - s.ahead * s.n_heads;
        for (int64_t i = n_before - 1; s.ordered && i >= 0; --i) {
            fill_query(i);
        }
        for (int64_t i = n_before; s.ordered && i < ggml_nrows(q); ++i) {
            fill_query(i);
        }
    }

    // The query with k_b absorbed.
    std::vector<double> absorbed_query(int64_t row) const {
        std::vector<double> f(s.n_cache());
        const float *       x = q_f.data() + row * s.n_key();
        if (!s.expand) {
            std::copy(x, x + s.n_cache(), f.begin());
            return f;
        }
        const int64_t head = row % s.n_heads;
        for (int64_t j = 0; j < s.n_latent; ++j) {
            for (int64_t d = 0; d < s.n_nope; ++d) {
                f[j] += (double) x[d] * k_b_f[(head * s.n_latent + j) * s.n_nope + d];
            }
        }
        std::copy(x + s.n_nope, x + s.n_key(), f.begin() + s.n_latent);
        return f;
    }

    std::vector<double> oracle(int64_t row) const {
        const int64_t       stream = row / (s.n_queries * s.n_heads);
        const int64_t       query  = row / s.n_heads % s.n_queries;
        const int64_t       head   = row % s.n_heads;
        const float *       keys   = cache_f.data() + stream * s.n_keys * s.n_cache();
        std::vector<double> f      = absorbed_query(row);
        std::vector<double> score(s.n_keys, -std::numeric_limits<double>::infinity());
        double              top = -std::numeric_limits<double>::infinity();
        for (int64_t key = 0; key < s.n_keys; ++key) {
            if (s.visible(stream, query, key)) {
                double dot = 0.0;
                for (int64_t d = 0; d < s.n_cache(); ++d) {
                    dot += f[d] * keys[key * s.n_cache() + d];
                }
                score[key] = dot * scale();
                top        = std::max(top, score[key]);
            }
        }
        std::vector<double> latent(s.n_latent), result(s.n_out());
        double              sum = 0.0;
        for (int64_t key = 0; key < s.n_keys; ++key) {
            if (s.visible(stream, query, key)) {
                const double weight = std::exp(score[key] - top);
                sum += weight;
                for (int64_t d = 0; d < s.n_latent; ++d) {
                    latent[d] += weight * keys[key * s.n_cache() + d];
                }
            }
        }
        for (int64_t d = 0; d < s.n_out() && sum > 0.0; ++d) {
            if (s.expand) {
                for (int64_t j = 0; j < s.n_latent; ++j) {
                    result[d] += latent[j] * v_b_f[(head * s.n_value + d) * s.n_latent + j];
                }
            } else {
                result[d] = latent[d];
            }
            result[d] /= sum;
        }
        return result;
    }
};
