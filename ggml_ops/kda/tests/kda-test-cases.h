#pragma once

// The KDA cases for test-backend-ops, which includes this file after struct test_case.

#include "ggml-kda-conv.h"
#include "ggml-kda-scan.h"

// Common to both operators: shapes, the rows of the cache, and the copy of the new states after them.
struct test_kda : public test_case {
    const int64_t head_size;
    const int64_t head_count;
    const int64_t n_seq_tokens;
    const int64_t n_seqs;
    const int64_t n_snapshots;
    const bool    new_seq;   // the last sequence starts from zero
    const bool    strided;   // sources are views of larger tensors
    const bool    in_place;  // the new states are copied to the rows that were read

    ggml_tensor * copy = nullptr;

    test_kda(int64_t head_size,
             int64_t head_count,
             int64_t n_seq_tokens,
             int64_t n_seqs,
             int64_t n_snapshots,
             bool    new_seq,
             bool    strided,
             bool    in_place) :
        head_size(head_size), head_count(head_count), n_seq_tokens(n_seq_tokens), n_seqs(n_seqs),
        n_snapshots(n_snapshots), new_seq(new_seq), strided(strided), in_place(in_place) {}

    std::string vars() override {
        return VARS_TO_STR8(head_size, head_count, n_seq_tokens, n_seqs, n_snapshots, new_seq, strided, in_place);
    }

    // one cell more than sequences, for permutations and for the zero row of a new sequence
    int64_t n_cells() const { return n_seqs + 1; }

    int32_t zero_row() const { return new_seq ? n_seqs : -1; }

    int64_t n_slots() const { return std::min(n_seq_tokens + 1, n_snapshots); }

    ggml_tensor *
    source(ggml_context * ctx, const char * name, int64_t ne0, int64_t ne1, int64_t ne2 = 1, int64_t ne3 = 1) {
        ggml_tensor * t = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, strided ? 2 * ne0 : ne0, ne1, ne2, ne3);
        ggml_set_name(t, name);
        return strided ? ggml_view_4d(ctx, t, ne0, ne1, ne2, ne3, t->nb[1], t->nb[2], t->nb[3], 0) : t;
    }

    ggml_tensor * weight(ggml_context * ctx, const char * name, int64_t ne0, int64_t ne1) {
        ggml_tensor * t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, ne0, ne1);
        ggml_set_name(t, name);
        return t;
    }

    ggml_tensor * new_cache(ggml_context * ctx, int64_t state) {
        return weight(ctx, "cache", state, n_cells() * n_snapshots);
    }

    ggml_tensor * new_rows(ggml_context * ctx) {
        ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_seqs);
        ggml_set_name(t, "rows");
        return t;
    }

    ggml_tensor * with_copy(ggml_context * ctx, ggml_tensor * op, ggml_tensor * cache, int64_t n_out) {
        if (!in_place) {
            return op;
        }
        const size_t  state = cache->nb[1];
        ggml_tensor * from =
            ggml_view_3d(ctx, op, cache->ne[0], n_seqs, n_slots(), state, state * n_seqs, n_out * sizeof(float));
        ggml_tensor * to = ggml_view_3d(ctx, cache, cache->ne[0], n_seqs, n_slots(), state, state * n_cells(), 0);
        copy             = ggml_cpy(ctx, from, to);
        return ggml_sum(ctx, ggml_cont(ctx, copy));  // Metal sums contiguous tensors only
    }

    bool run_whole_graph() override { return in_place; }

    std::vector<ggml_tensor *> fusion_test_nodes() override {
        return in_place ? std::vector<ggml_tensor *>{ copy } : std::vector<ggml_tensor *>{};
    }

    void init_rows(ggml_tensor * t) {
        std::vector<int32_t> rows(n_seqs);
        for (int64_t s = 0; s < n_seqs; ++s) {
            rows[s] = in_place ? s : n_seqs - 1 - s;
        }
        if (new_seq) {
            rows[n_seqs - 1] = zero_row();
        }
        ggml_backend_tensor_set(t, rows.data(), 0, rows.size() * sizeof(int32_t));
    }

    struct range {
        const char * name;
        float        min;
        float        max;
    };

    void init_from(ggml_context * ctx, const std::vector<range> & ranges) {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (ggml_is_view_op(t->op)) {
                continue;
            }
            if (strcmp(t->name, "rows") == 0) {
                init_rows(t);
                continue;
            }
            const auto r =
                std::find_if(ranges.begin(), ranges.end(), [&](const range & x) { return !strcmp(x.name, t->name); });
            if (r == ranges.end()) {
                init_tensor_uniform(t);
            } else {
                init_tensor_uniform(t, r->min, r->max);
            }
        }
    }
};

struct test_kda_conv : public test_kda {
    using test_kda::test_kda;

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "KDA_CONV";
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int64_t C     = head_size * head_count;
        ggml_tensor * q     = source(ctx, "q", C, n_seq_tokens, n_seqs);
        ggml_tensor * k     = source(ctx, "k", C, n_seq_tokens, n_seqs);
        ggml_tensor * v     = source(ctx, "v", C, n_seq_tokens, n_seqs);
        ggml_tensor * cache = new_cache(ctx, 9 * C);
        ggml_tensor * src[] = {
            q, k, v, weight(ctx, "wq", 4, C), weight(ctx, "wk", 4, C), weight(ctx, "wv", 4, C), cache, new_rows(ctx)
        };
        ggml_tensor * op = ggml_kda_conv(ctx, src, { (int32_t) head_size, (int32_t) n_snapshots, zero_row(), 1e-6f });
        ggml_set_name(op, "kda_conv");
        return with_copy(ctx, op, cache, 3 * C * n_seq_tokens * n_seqs);
    }

    void initialize_tensors(ggml_context * ctx) override { init_from(ctx, { { "q", -4, 4 }, { "k", -1e-3f, 1e-3f } }); }
};

struct test_kda_scan : public test_kda {
    const float f_max;  // gates: f is in [-f_max, f_max], and -exp(A_log) in [-4, 0]
    const float lower_bound;

    test_kda_scan(int64_t head_size,
                  int64_t head_count,
                  int64_t n_seq_tokens,
                  int64_t n_seqs,
                  int64_t n_snapshots = 1,
                  bool    new_seq     = false,
                  bool    strided     = false,
                  bool    in_place    = false,
                  float   f_max       = 8,
                  float   lower_bound = -INFINITY) :
        test_kda(head_size, head_count, n_seq_tokens, n_seqs, n_snapshots, new_seq, strided, in_place), f_max(f_max),
        lower_bound(lower_bound) {}

    std::string op_desc(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return "KDA_SCAN";
    }

    std::string vars() override { return test_kda::vars() + "," + VARS_TO_STR2(f_max, lower_bound); }

    uint64_t op_flops(ggml_tensor * t) override {
        GGML_UNUSED(t);
        return 8ull * head_size * head_size * head_count * n_seq_tokens * n_seqs;
    }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int64_t D     = head_size;
        const int64_t H     = head_count;
        const int64_t T     = n_seq_tokens;
        ggml_tensor * qkv   = source(ctx, "qkv", D, 3 * H, T, n_seqs);
        ggml_tensor * f     = source(ctx, "f", D, H, T, n_seqs);
        ggml_tensor * beta  = source(ctx, "beta", H, T, n_seqs);
        ggml_tensor * gate  = source(ctx, "gate", D, H, T, n_seqs);
        ggml_tensor * cache = new_cache(ctx, D * D * H);
        ggml_tensor * src[] = { qkv,          f,    weight(ctx, "dt_bias", D * H, 1), weight(ctx, "a", 1, H),
                                beta,         gate, weight(ctx, "norm", D, 1),        cache,
                                new_rows(ctx) };
        ggml_tensor * op    = ggml_kda_scan(ctx, src, { (int32_t) n_snapshots, zero_row(), 1e-5f, lower_bound });
        ggml_set_name(op, "kda_scan");
        return with_copy(ctx, op, cache, D * H * T * n_seqs);
    }

    void initialize_tensors(ggml_context * ctx) override {
        const float unit = sqrtf(3.0f / head_size);  // rows of norm about 1
        init_from(ctx, { { "qkv", -unit, unit },
                         { "f", -f_max, f_max },
                         { "a", -4, 0 },
                         { "beta", -4, 4 },
                         { "dt_bias", -4, 0 } });
    }
};

static void add_kda_eval_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (const int64_t D : { 32, 64, 96, 128, 256 }) {
        for (const int64_t T : { 1, 2, 15, 16, 17, 64, 65 }) {
            cases.emplace_back(new test_kda_conv(D, 4, T, 2, 1, T == 1, T % 2 == 0, false));
            cases.emplace_back(new test_kda_conv(D, 4, T, 2, std::min<int64_t>(T + 1, 4), false, false, true));
            cases.emplace_back(new test_kda_scan(D, 4, T, 2, 1, T == 1, T % 2 == 0, false));
            cases.emplace_back(new test_kda_scan(D, 4, T, 2, std::min<int64_t>(T + 1, 4), true, false, true));
        }
    }
    for (const int64_t T : { 1, 5, 33, 64, 100, 257 }) {
        for (const float f_max : { 0.0f, 30.0f, 180.0f }) {  // log-gates down to -720
            for (const float lower_bound : { -INFINITY, -5.0f }) {
                cases.emplace_back(new test_kda_scan(128, 2, T, 3, 1, true, true, false, f_max, lower_bound));
            }
        }
    }
}

static void add_kda_perf_cases(std::vector<std::unique_ptr<test_case>> & cases) {
    for (const int64_t T : { 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192 }) {
        cases.emplace_back(new test_kda_conv(128, 32, T, 1, 1, false, false, false));
        cases.emplace_back(new test_kda_scan(128, 32, T, 1));
    }
    for (const int64_t S : { 2, 4, 8 }) {
        cases.emplace_back(new test_kda_conv(128, 32, 1, S, 1, false, false, false));
        cases.emplace_back(new test_kda_scan(128, 32, 1, S));
    }
}
