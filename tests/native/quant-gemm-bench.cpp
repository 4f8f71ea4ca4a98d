// Times one product with and without the kernels of quant_gemm, in turn: processor time of one thread, the smallest of
// some runs, so that a busy machine disturbs little.
//
//   quant-gemm-bench [type=q4_0] [repack=1] [experts=32] [used=8] [k=2304] [rows=1024] [tokens=512] [runs=5]
//
// experts=0 measures MUL_MAT. Prints ms of upstream's path, ms of ours, their ratio and ours in GMAC/s.

#include "cpu_backend.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml-quant-gemm.h"
#include "ggml.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <random>
#include <string>
#include <vector>

static double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static ggml_backend_buffer_type_t weights_buffer_type(bool repack) {
    ggml_backend_buffer_type_t found = repack ? repack_buffer_type() : nullptr;
    return found != nullptr ? found : ggml_backend_cpu_buffer_type();
}

int main(int argc, char ** argv) {
    std::map<std::string, std::string> options = {
        { "type", "q4_0" }, { "repack", "1" },  { "experts", "32" }, { "used", "8" },
        { "k", "2304" },    { "rows", "1024" }, { "tokens", "512" }, { "runs", "5" },
    };
    for (int i = 1; i < argc; i++) {
        char * const equals = strchr(argv[i], '=');
        if (equals == nullptr || options.count(std::string(argv[i], equals)) == 0) {
            fprintf(stderr, "unknown option %s\n", argv[i]);
            return 1;
        }
        options[std::string(argv[i], equals)] = equals + 1;
    }
    const auto    number  = [&](const char * name) { return (int64_t) atoll(options[name].c_str()); };
    const int64_t experts = number("experts"), used = number("used"), k = number("k"), rows = number("rows");
    const int64_t tokens = number("tokens");
    ggml_type     type   = GGML_TYPE_COUNT;
    for (int t = 0; t < GGML_TYPE_COUNT; t++) {
        if (options["type"] == ggml_type_name((ggml_type) t)) {
            type = (ggml_type) t;
        }
    }
    if (type == GGML_TYPE_COUNT) {
        fprintf(stderr, "type=%s is no type of ggml\n", options["type"].c_str());
        return 1;
    }

    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, 1);
    ggml_init_params params = { ggml_tensor_overhead() * 16 + 2 * ggml_graph_overhead(), nullptr, true };
    ggml_context *   w_ctx  = ggml_init(params);
    ggml_context *   ctx    = ggml_init(params);
    ggml_tensor *    weights =
        experts ? ggml_new_tensor_3d(w_ctx, type, k, rows, experts) : ggml_new_tensor_2d(w_ctx, type, k, rows);
    ggml_tensor * acts = experts ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, 1, tokens)
                                 : ggml_new_tensor_2d(ctx, GGML_TYPE_F32, k, tokens);
    ggml_tensor * ids  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, used, tokens);
    ggml_cgraph * graphs[2];  // upstream's, ours
    for (int ours = 0; ours < 2; ours++) {
        ggml_tensor * result = experts ? ggml_mul_mat_id(ctx, weights, acts, ids) : ggml_mul_mat(ctx, weights, acts);
        if (!ours) {
            ggml_quant_gemm_switch_off(result);
        }
        graphs[ours] = ggml_new_graph(ctx);
        ggml_build_forward_expand(graphs[ours], result);
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
    ggml_backend_buffer_t w_buffer =
        ggml_backend_alloc_ctx_tensors_from_buft(w_ctx, weights_buffer_type(number("repack") != 0));

    if (number("repack") && weights->extra == nullptr) {
        fprintf(stderr, "%s is not repacked on this CPU: repack=0\n", options["type"].c_str());
        return 1;
    }

    std::mt19937                    rng(1);
    std::normal_distribution<float> normal;
    std::vector<float>              x(ggml_nelements(acts));
    std::generate(x.begin(), x.end(), [&] { return normal(rng); });
    ggml_backend_tensor_set(acts, x.data(), 0, ggml_nbytes(acts));
    std::vector<float> w(k * rows);  // the same for every expert
    std::generate(w.begin(), w.end(), [&] { return normal(rng); });
    std::vector<uint8_t> stored(ggml_nbytes(weights));
    const size_t         one = stored.size() / weights->ne[2];
    ggml_quantize_chunk(type, w.data(), stored.data(), 0, rows, k, nullptr);
    for (int64_t e = 1; e < weights->ne[2]; e++) {
        memcpy(stored.data() + e * one, stored.data(), one);
    }
    ggml_backend_tensor_set(weights, stored.data(), 0, stored.size());
    std::vector<int32_t> routing(used * tokens), all(std::max<int64_t>(experts, used));
    for (size_t e = 0; e < all.size(); e++) {
        all[e] = (int32_t) e;
    }
    for (int64_t t = 0; t < tokens; t++) {
        std::shuffle(all.begin(), all.end(), rng);
        std::copy(all.begin(), all.begin() + used, &routing[t * used]);
    }
    ggml_backend_tensor_set(ids, routing.data(), 0, ggml_nbytes(ids));

    double best[2] = { 1e9, 1e9 };
    for (int run = 0; run <= number("runs"); run++) {
        for (int ours = 0; ours < 2; ours++) {
            const double start = thread_seconds();
            ggml_backend_graph_compute(backend, graphs[ours]);
            const double end = thread_seconds();
            best[ours]       = run == 0 ? best[ours] : std::min(best[ours], end - start);
        }
    }
    const double macs = (double) k * rows * tokens * (experts ? used : 1);
    printf("%s%s k %lld rows %lld tokens %lld experts %lld: upstream %.3f ms, ours %.3f ms, ratio %.2f, %.0f GMAC/s\n",
           options["type"].c_str(), number("repack") ? " repacked" : "", (long long) k, (long long) rows,
           (long long) tokens, (long long) experts, best[0] * 1e3, best[1] * 1e3, best[0] / best[1],
           macs / best[1] * 1e-9);
    ggml_backend_buffer_free(buffer);
    ggml_backend_buffer_free(w_buffer);
    ggml_free(ctx);
    ggml_free(w_ctx);
    ggml_backend_free(backend);
    return 0;
}
