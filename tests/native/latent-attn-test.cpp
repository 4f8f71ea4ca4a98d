// Latent attention against float64, in both forms: every type, lengths around the borders of tiles and vectors, masks
// with holes, several streams, flat and peaked scores, poisoned padding; and the same bits for any number of threads.
// Prints one line for each failure and the count; exit status 1 if there was one.

#include "latent-attn-case.h"

static int n_failed = 0;
static int n_done   = 0;

static const double EXACT_LIMIT     = 1e-7;  // F32, F16, BF16
static const double QUANTISED_LIMIT = 2e-5;  // against the dequantised values

static std::string name_of(const LatentShape & s) {
    char text[256];
    snprintf(text, sizeof(text), "%s %s queries %lld keys %lld heads %lld streams %lld latent %lld mask %s spread %g%s",
             s.expand ? "decompressed" : "absorbed", ggml_type_name(s.cache), (long long) s.n_queries,
             (long long) s.n_keys, (long long) s.n_heads, (long long) s.n_streams, (long long) s.n_latent,
             s.mask.c_str(), s.spread, s.poison ? " poisoned" : "");
    return text;
}

static void expect(bool good, const LatentShape & s, const char * what, double value) {
    ++n_done;
    if (!good) {
        ++n_failed;
        printf("FAILED %s: %s (%g)\n", name_of(s).c_str(), what, value);
    }
}

static void check(const LatentShape & s, const std::vector<int> & more_threads = { 2, 3, 5 }) {
    if (!chosen()) {
        return;
    }
    LatentCase attention(s);
    attention.compute(1);
    const std::vector<float> one   = attention.result();
    const double             limit = ggml_is_quantized(s.cache) ? QUANTISED_LIMIT : EXACT_LIMIT;
    const double             error = attention.nmse(12);
    expect(error <= limit, s, "NMSE against float64", error);  // false for NaN too
    for (const int n_threads : more_threads) {
        attention.compute(n_threads);
        const std::vector<float> many = attention.result();
        expect(memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0, s, "not the bits of one thread with",
               n_threads);
    }
}

int main() {
    const ggml_type types[]   = { GGML_TYPE_F32,  GGML_TYPE_F16,  GGML_TYPE_BF16,
                                  GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q5_1 };
    const int64_t   lengths[] = { 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 700 };

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
                    LatentShape s = base;
                    s.n_keys      = n_keys;
                    s.n_queries   = std::min(n_queries, n_keys);
                    check(s);
                }
            }
            for (const char * mask : { "none", "mixed", "blind" }) {
                for (const int64_t n_streams : { 1, 3 }) {
                    for (const int64_t n_heads : { 1, 3, 32 }) {
                        LatentShape s = base;
                        s.n_keys      = 300;
                        s.n_queries   = 9;
                        s.n_heads     = n_heads;
                        s.n_streams   = n_streams;
                        s.mask        = mask;
                        s.poison      = true;
                        check(s);
                    }
                }
            }
            for (const float spread : { 0.0f, 5.0f, 40.0f }) {
                LatentShape s = base;
                s.n_keys      = 600;
                s.n_queries   = 3;
                s.spread      = spread;
                check(s);
            }
            LatentShape crowd = base;  // more threads than heads: they share out the queries
            crowd.n_keys      = 700;
            crowd.n_queries   = 300;
            crowd.n_heads     = 2;
            for (const char * mask : { "causal", "mixed" }) {
                crowd.mask = mask;
                check(crowd, { 2, 3, 4, 7, 12 });
            }
            LatentShape odd = base;  // an odd number of visible keys in the last pair
            odd.n_keys      = 77;
            odd.n_queries   = 1;
            odd.mask        = "none";
            odd.n_heads     = 32;
            check(odd);
            LatentShape kimi;
            kimi.expand    = expand;
            kimi.cache     = type;
            kimi.weights   = GGML_TYPE_Q8_0;
            kimi.n_keys    = 513;
            kimi.n_queries = 3;
            check(kimi);
        }
    }
    printf("%d of %d checks passed\n", n_done - n_failed, n_done);
    return n_failed != 0;
}
