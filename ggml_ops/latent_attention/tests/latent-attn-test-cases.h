#pragma once

// The latent attention cases for test-backend-ops, which includes this file after test_flash_attn_ext.

#include "ggml-latent-attn.h"
#include "ggml-op-marks.h"

// The absorbed form. The plain path it is compared with rounds more (F16 sums for an F16 cache, queries in the cache's
// type), so these bounds are those of the plain path; another test compares with the float64 oracle.
struct test_latent_absorbed : public test_flash_attn_ext {
    const bool exact;  // CUDA's most accurate kernels, also where upstream's are faster

    test_latent_absorbed(int64_t                hsk,
                         int64_t                hsv,
                         int64_t                n_heads,
                         int64_t                n_streams,
                         int64_t                n_keys,
                         int64_t                n_queries,
                         bool                   mask,
                         ggml_type              type,
                         bool                   exact   = false,
                         std::array<int32_t, 4> permute = { 0, 1, 2, 3 }) :
        test_flash_attn_ext(hsk,
                            hsv,
                            1,
                            { n_heads, n_streams },
                            n_keys,
                            n_queries,
                            mask,
                            false,
                            0.0f,
                            0.0f,
                            GGML_PREC_F32,
                            type,
                            type,
                            permute,
                            true,
                            true),
        exact(exact) {}

    std::string vars() override { return test_flash_attn_ext::vars() + ",exact=" + var_to_str(exact); }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        ggml_tensor * out = test_flash_attn_ext::build_graph(ctx);
        if (exact) {
            ggml_op_set_mark(out, GGML_OP_MARK_EXACT);
        }
        return out;
    }

    double max_nmse_err() override {
        switch (type_K) {
        case GGML_TYPE_F32:
            return 1e-7;
        case GGML_TYPE_BF16:
            return 1e-5;
        case GGML_TYPE_F16:
            return 5e-4;
        default:
            return 1e-4;
        }
    }
};

// The decompressed form.
struct test_latent_attn : public test_case {
    const std::array<int64_t, 4> dims;  // nope, rope, latent, value
    const int64_t                n_heads;
    const int64_t                n_streams;
    const int64_t                n_keys;
    const int64_t                n_queries;
    const bool                   mask;
    const ggml_type              type_cache;
    const ggml_type              type_weights;
    const bool                   exact;

    std::string vars() override {
        return VARS_TO_STR9(dims, n_heads, n_streams, n_keys, n_queries, mask, type_cache, type_weights, exact);
    }

    // CUDA multiplies one half per value, except with F32 caches or `exact`.
    double max_nmse_err() override {
        return ggml_is_quantized(type_cache) ? 2e-6 : type_cache == GGML_TYPE_F32 || exact ? 1e-7 : 5e-6;
    }

    uint64_t op_flops(ggml_tensor *) override {
        const int64_t pair   = dims[0] + dims[1] + dims[3];
        const int64_t expand = dims[2] * (dims[0] + dims[3]);
        return 2 * n_streams * n_heads * n_keys * (n_queries * pair + expand);
    }

    test_latent_attn(std::array<int64_t, 4> dims,
                     int64_t                n_heads,
                     int64_t                n_streams,
                     int64_t                n_keys,
                     int64_t                n_queries,
                     bool                   mask,
                     ggml_type              type_cache,
                     ggml_type              type_weights,
                     bool                   exact = false) :
        dims(dims), n_heads(n_heads), n_streams(n_streams), n_keys(n_keys), n_queries(n_queries), mask(mask),
        type_cache(type_cache), type_weights(type_weights), exact(exact) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const auto [nope, rope, latent, value] = dims;
        // q as in llama.cpp's graphs, heads before tokens; the cache is longer than n_keys
        ggml_tensor * q     = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, nope + rope, n_heads, n_queries, n_streams);
        ggml_tensor * cache = ggml_new_tensor_4d(ctx, type_cache, latent + rope, 2 * n_keys, 1, n_streams);
        ggml_tensor * k_b   = ggml_new_tensor_3d(ctx, type_weights, nope, latent, n_heads);
        ggml_tensor * v_b   = ggml_new_tensor_3d(ctx, type_weights, latent, value, n_heads);
        ggml_tensor * m     = mask ? ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_keys, n_queries, 1, n_streams) : nullptr;
        ggml_tensor * k =
            ggml_view_4d(ctx, cache, latent + rope, n_keys, 1, n_streams, cache->nb[1], cache->nb[2], cache->nb[3], 0);
        ggml_set_name(q, "q");
        ggml_set_name(cache, "cache");
        ggml_set_name(k_b, "k_b");
        ggml_set_name(v_b, "v_b");
        if (m) {
            ggml_set_name(m, "m");
        }
        ggml_tensor * out = ggml_latent_attn(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), k, k_b, v_b, m,
                                             1.0f / sqrtf((float) (nope + rope)));
        ggml_set_name(out, "out");
        if (exact) {
            ggml_op_set_mark(out, GGML_OP_MARK_EXACT);
        }
        return out;
    }

    void initialize_tensors(ggml_context * ctx) override {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (strcmp(t->name, "m") == 0) {
                init_tensor_kq_mask(t);
            } else if (!t->view_src) {
                init_tensor_uniform(t);
            }
        }
    }
};

static const std::array<int64_t, 4> LATENT_KIMI  = { 128, 64, 512, 128 };
static const std::array<int64_t, 4> LATENT_SMALL = { 32, 32, 64, 32 };
static const std::array<int64_t, 4> LATENT_ODD   = { 48, 16, 112, 40 };  // not multiples of any vector width

static void add_latent_eval_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (ggml_type type :
         { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q5_1 }) {
        for (int64_t n_keys : { 1, 65, 512 }) {
            for (int64_t n_queries : { 1, 3, 17 }) {
                cases.emplace_back(new test_latent_absorbed(576, 512, 32, 1, n_keys, n_queries, true, type, true));
            }
        }
        cases.emplace_back(new test_latent_absorbed(576, 512, 20, 2, 256, 2, true, type, true));
        cases.emplace_back(new test_latent_absorbed(320, 256, 5, 3, 127, 7, true, type, true, { 0, 2, 1, 3 }));
        cases.emplace_back(new test_latent_absorbed(576, 512, 16, 1, 300, 40, false, type, true));
    }
    if (getenv("KIMI_LONG_CASES") != nullptr) {  // on CUDA in runs of keys; an emulator would take hours
        for (ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            for (int64_t n_queries : { 11, 300 }) {
                cases.emplace_back(new test_latent_absorbed(576, 512, 32, 1, 117248, n_queries, true, type));
            }
        }
    }
    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (int64_t n_keys : { 1, 64, 129 }) {
            for (int64_t n_queries : { 1, 63, 65 }) {
                cases.emplace_back(new test_latent_attn(LATENT_SMALL, 3, 1, n_keys, n_queries, true, type, type));
            }
        }
        cases.emplace_back(new test_latent_attn(LATENT_KIMI, 2, 1, 300, 130, true, type, GGML_TYPE_Q8_0));
        cases.emplace_back(new test_latent_attn(LATENT_KIMI, 2, 2, 200, 33, true, type, GGML_TYPE_F16));
        cases.emplace_back(new test_latent_attn(LATENT_KIMI, 2, 1, 200, 33, true, type, GGML_TYPE_F16, true));
        cases.emplace_back(new test_latent_attn(LATENT_KIMI, 2, 1, 200, 33, false, type, GGML_TYPE_F32));
    }
    cases.emplace_back(new test_latent_attn(LATENT_ODD, 3, 2, 77, 19, true, GGML_TYPE_F16, GGML_TYPE_F16));
    cases.emplace_back(new test_latent_attn(LATENT_ODD, 3, 2, 77, 19, true, GGML_TYPE_F32, GGML_TYPE_F32));
}

static void add_latent_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (bool exact : { false, true }) {
        for (int64_t n_keys : { 512, 1024, 2048, 4096, 16384, 65536, 131072 }) {
            for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
                for (int64_t n_queries : { 1, 8 }) {
                    cases.emplace_back(new test_latent_absorbed(576, 512, 32, 1, n_keys, n_queries, true, type, exact));
                }
            }
        }
        for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q4_0 }) {
            cases.emplace_back(new test_latent_absorbed(576, 512, 32, 1, 16384, 1, true, type, exact));
        }
    }
    for (int64_t n_queries : { 9, 11, 16, 64, 128 }) {
        cases.emplace_back(new test_latent_absorbed(576, 512, 32, 1, 131072, n_queries, true, GGML_TYPE_Q8_0));
    }
    for (int64_t n_keys : { 512, 4096, 16384 }) {
        for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            for (int64_t n_queries : { 192, 480, 512 }) {
                cases.emplace_back(new test_latent_absorbed(576, 512, 32, 1, n_keys, n_queries, true, type));
                cases.emplace_back(
                    new test_latent_attn(LATENT_KIMI, 32, 1, n_keys, n_queries, true, type, GGML_TYPE_Q8_0));
            }
        }
        cases.emplace_back(
            new test_latent_attn(LATENT_KIMI, 32, 1, n_keys, 512, true, GGML_TYPE_F16, GGML_TYPE_Q8_0, true));
    }
}
