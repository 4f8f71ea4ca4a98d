// Latent attention against float64, in both forms: every type, lengths around the borders of tiles and vectors, masks
// with holes, several streams, flat and peaked scores, poisoned padding; and bit-identical results for any number of
// threads. Prints one line per failure and the count; exit status 1 if there was a failure.

#include "latent-attn-case.h"

static void check(const LatentShape & s) {
    if (!chosen()) {
        return;
    }
    LatentCase attention(s);
    attention.compute(1);
    const std::vector<float> one   = attention.result();
    const double             error = attention.nmse(12);
    const std::string        name  = name_of(s);
    expect(error <= limit_of(s.cache), name + text(": NMSE against float64 %g", error));  // false for NaN too
    for (const int n_threads : thread_counts()) {
        attention.compute(n_threads);
        const std::vector<float> many = attention.result();
        expect(memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0,
               name + text(": not the bits of one thread with %d", n_threads));
    }
}

static std::vector<float> result_of(const LatentShape & s, int n_threads) {
    LatentCase attention(s);
    attention.compute(n_threads);
    return attention.result();
}

// With an order of the keys, a query has the same bits alone and with many others, some of which see more keys, and wherever
// the cells are.
static void check_order(LatentShape s) {
    if (!chosen()) {
        return;
    }
    s.ordered = true;
    check(s);
    const std::vector<float> alone = result_of(s.with(1, s.n_keys), 1);
    for (const int64_t n_queries : { 2, 5, 600 }) {
        for (const bool backwards : { false, true }) {
            for (const int64_t ahead : { (int64_t) 0, n_queries / 2 }) {
                LatentShape other              = s.with(n_queries, s.n_keys + ahead);
                other.backwards                = backwards;
                other.ahead                    = ahead;
                const std::vector<float> found = result_of(other, 2);
                const float *            mine  = found.data() + (found.size() - (ahead + 1) * alone.size());
                expect(memcmp(alone.data(), mine, alone.size() * sizeof(float)) == 0,
                       name_of(other) + text(": the query before the last %d has other bits alone", (int) ahead));
            }
        }
    }
}

// Whether values of the decompressed form are multiplied as integers, except with F32 caches (latent-simd.h).
static bool multiplies_integers() {
    return cpu_has("AVX512") ? cpu_has("AVX512_VNNI") : cpu_has("AVX2") && cpu_has("FMA");
}

// Values on which integers with few bits are wrong: keys with large and with small values, equal values, one large value
// among small ones, equal keys, and a row of v_b with NaN.
static void check_values(LatentShape s) {
    const float deviations[][2] = { { 1e-4f, 100.0f }, { 100.0f, 1e-4f }, { 1e-6f, 1e-6f } };
    for (const auto & [first, last] : deviations) {
        s.first = first;
        s.last  = last;
        for (const bool alike : { false, true }) {
            s.alike = alike;
            check(s);
        }
    }
    s.alike = false;
    s.first = s.last = 1.0f;

    // rounding errors that are equal for many keys must not add up
    for (const int64_t period : { 1, 2, 32 }) {
        LatentShape repeated = s;
        repeated.period      = period;
        for (const float heavy : { 9.0f, 10.5f, 11.5f }) {
            repeated.heavy = heavy;
            check(repeated);
        }
    }
    if (s.cache == GGML_TYPE_F16) {
        LatentShape common = s;
        common.values      = "common";
        check(common);
        LatentShape sink = s;  // an attention sink of one channel
        sink.values      = "massive";
        sink.heavy       = 9.0f;
        check(sink);
    }
    for (const int64_t n_value : { 24, 40 }) {  // no multiple of a vector
        LatentShape narrow = s;
        narrow.n_value     = n_value;
        check(narrow);
    }

    LatentShape loud = s;
    loud.values      = "loud";
    LatentCase attention(loud);
    attention.compute(2);
    double error = attention.nmse(12, 1);
    expect(error <= limit_of(s.cache), name_of(loud) + text(": NMSE of the other values %g", error));

    s.mask = "blind";  // the result of the first query is zero, whatever the weights are
    LatentCase broken(s);
    broken.break_first_value();
    broken.compute(2);
    const std::vector<float> found = broken.result();
    bool                     only  = true;
    for (size_t i = 0; i < found.size(); ++i) {
        const int64_t row = i / s.n_value;
        only = only && std::isnan(found[i]) == (row >= s.n_heads && row % s.n_heads == 0 && i % s.n_value == 0);
    }
    expect(only, name_of(s) + ": expected NaN in the first value of the first head only");
    error = broken.nmse(12, 1);
    expect(error <= limit_of(s.cache), name_of(s) + text(": NMSE of the values beside NaN %g", error));
}

// A key that is not finite makes the results of the queries that see it NaN, and those only; a query with NaN its own.
static void check_broken(const LatentShape & s) {
    if (!chosen()) {
        return;
    }
    const std::vector<float> whole      = result_of(s, 1);
    const auto               expect_nan = [&](LatentCase & broken, const char * what, const auto & is_broken) {
        broken.compute(2);
        const std::vector<float> found  = broken.result();
        int64_t                  finite = 0;
        int64_t                  other  = 0;
        for (size_t i = 0; i < found.size(); ++i) {
            const int64_t row = i / s.n_out();
            if (is_broken(row / s.n_heads / s.n_queries, row)) {
                finite += !std::isnan(found[i]);
            } else {
                other += memcmp(&found[i], &whole[i], sizeof(float)) != 0;
            }
        }
        expect(finite == 0 && other == 0, name_of(s) + text(": %s: %d values are not NaN, %d others have other bits",
                                                            what, (int) finite, (int) other));
    };
    for (const int64_t key : { (int64_t) 0, (int64_t) 70, s.n_keys - 1 }) {
        for (const bool infinite : { false, true }) {
            if (!infinite || !ggml_is_quantized(s.cache)) {
                LatentCase broken(s);
                broken.break_key(0, key, infinite);
                expect_nan(broken, infinite ? "infinite key" : "NaN key", [&](int64_t stream, int64_t row) {
                    return stream == 0 && s.visible(stream, row / s.n_heads % s.n_queries, key);
                });
            }
        }
    }
    LatentCase broken(s);
    broken.break_query(2 * s.n_heads);
    expect_nan(broken, "NaN query", [&](int64_t, int64_t row) { return row == 2 * s.n_heads; });
}

// The mark for accurate kernels selects float32.
static void check_exact(LatentShape s) {
    LatentCase integers(s);
    integers.compute(2);
    const std::vector<float> usual = integers.result();
    double                   error = integers.nmse(12);
    expect(error <= 2e-8, name_of(s) + text(": NMSE against float64 %g", error));
    error = integers.worst_nmse(36);
    expect(error <= 2e-8, name_of(s) + text(": NMSE of a row against float64 %g", error));
    s.exact = true;
    LatentCase attention(s);
    attention.compute(2);
    error = attention.nmse(12);
    expect(error <= 1e-11, name_of(s) + text(": NMSE against float64 %g", error));
    expect((usual == attention.result()) == (s.cache == GGML_TYPE_F32 || !multiplies_integers()),
           name_of(s) + ": the mark has no effect, or has one without integers");
}

int main() {
    const ggml_type types[]   = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,
                                  GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q5_1 };
    const int64_t   lengths[] = { 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 700 };

    // the first case, which every share of the cases has: the plan of 7 threads requires less memory than that of 5
    LatentShape fewer = LatentShape().with(640, 700);
    fewer.expand      = true;
    fewer.n_heads     = 4;
    fewer.n_latent    = 128;
    fewer.n_rope      = 32;
    fewer.n_nope      = 32;
    fewer.n_value     = 32;
    check(fewer);

    for (const bool expand : { false, true }) {
        for (const ggml_type type : types) {
            LatentShape base;
            base.expand   = expand;
            base.cache    = type;
            base.n_heads  = 4;
            base.n_latent = 128;
            base.n_rope   = 32;
            base.n_nope   = 32;
            base.n_value  = 32;
            for (const int64_t n_keys : lengths) {
                for (const int64_t n_queries : { 1, 5, 70 }) {
                    check(base.with(std::min(n_queries, n_keys), n_keys));
                }
            }
            for (const char * mask : { "none", "mixed", "blind" }) {
                for (const int64_t n_streams : { 1, 3 }) {
                    for (const int64_t n_heads : { 1, 3, 32 }) {
                        LatentShape s = base.with(9, 300);
                        s.n_heads     = n_heads;
                        s.n_streams   = n_streams;
                        s.mask        = mask;
                        s.poison      = true;
                        check(s);
                    }
                }
            }
            for (const float spread : { 0.0f, 5.0f, 40.0f }) {
                LatentShape s = base.with(3, 600);
                s.spread      = spread;
                check(s);
            }
            LatentShape crowd = base.with(300, 700);  // more threads than heads: they split the queries
            crowd.n_heads     = 2;
            for (const char * mask : { "causal", "mixed" }) {
                crowd.mask = mask;
                check(crowd);
            }
            for (const int64_t n_keys : { 600, 5000 }) {
                LatentShape s = base.with(3, n_keys);
                s.spread      = n_keys == 600 ? 0.3f : 5.0f;  // nearly equal weights have the narrowest limits
                check_order(s);
            }
            LatentShape odd = base.with(1, 77);  // an odd number of visible keys in the last pair
            odd.mask        = "none";
            odd.n_heads     = 32;
            check(odd);
            for (const char * mask : { "causal", "mixed" }) {
                for (const int64_t n_keys : { 150, 2000 }) {
                    LatentShape s = base.with(9, n_keys);
                    s.mask        = mask;
                    check_broken(s);
                }
            }
            if (expand) {
                LatentShape values = base.with(3, 300);
                values.mask        = "none";
                check_values(values);
                check_exact(values);
            }
            LatentShape kimi = LatentShape().with(3, 513);
            kimi.expand      = expand;
            kimi.cache       = type;
            kimi.weights     = GGML_TYPE_Q8_0;
            check(kimi);
        }
    }
    return report();
}
