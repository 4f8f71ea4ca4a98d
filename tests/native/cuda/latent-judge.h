#pragma once

// How the tests of latent attention's CUDA kernels judge them: the same bits in all orders of lanes, the bound of the
// cache's type against float64, and nodes that are refused for the reason expected.

#include "../latent-attn-case.h"

using namespace cuda_emulator;

static const double EXACT_LIMIT     = 1e-7;  // F32, F16, BF16
static const double QUANTISED_LIMIT = 2e-5;  // against the dequantised values

static int    n_done, n_failed;
static double worst[GGML_TYPE_COUNT];

static void expect(bool good, const std::string & name, const std::string & what) {
    n_done++;
    if (!good) {
        n_failed++;
        printf("FAILED %s: %s\n", name.c_str(), what.c_str());
    }
}

// A tensor's bytes on the device; `before` bytes stand in front of them, so that they begin at another alignment.
static DeviceArray<char> to_device(const ggml_tensor * t, size_t before = 0) {
    std::vector<char> bytes(before + ggml_nbytes(t), '\xff');
    memcpy(bytes.data() + before, t->data, ggml_nbytes(t));
    return DeviceArray<char>(bytes);
}

// run: a node's result by the kernels. n_rows: of the result, how many are compared, 1: its first; 0: all.
template <typename Run>
static void judge(const LatentShape & s, const std::string & name, int64_t n_rows, const Run & run) {
    if (!chosen()) {
        return;
    }
    LatentCase         attention(s);
    ggml_tensor *      dst = attention.node();
    std::vector<float> first;
    try {
        in_all_orders([&](const char * order) {
            const std::vector<float> got = run(dst);
            if (first.empty()) {
                first = got;
            }
            expect(memcmp(first.data(), got.data(), got.size() * sizeof(float)) == 0, name,
                   std::string("other bits, lanes ") + order);
        });
    } catch (const std::exception & error) {
        expect(false, name, error.what());
        return;
    }
    memcpy(dst->data, first.data(), ggml_nbytes(dst));
    const double error = attention.nmse(n_rows == 0 ? s.n_rows() : n_rows);
    worst[s.cache]     = std::max(worst[s.cache], error);
    if (getenv("KIMI_VERBOSE")) {
        printf("%.1e %s\n", error, name.c_str());
    }
    expect(error <= (ggml_is_quantized(s.cache) ? QUANTISED_LIMIT : EXACT_LIMIT), name,
           "NMSE against float64 " + std::to_string(error * 1e9) + "e-9");  // false for NaN too
}

// why: what reading a node said, nullptr if it was taken.
static void refused_because(const char * why, const char * because) {
    expect(why != nullptr && strcmp(why, because) == 0, std::string("a node with ") + because,
           why ? why : "not refused");
}

// The tests of the types that the arguments name; without arguments, of refusals. Returns the exit status.
static int run_tests(int argc, char ** argv, void (*test_refusals)(), void (*test_type)(ggml_type)) {
    if (argc == 1) {
        test_refusals();
    }
    for (int i = 1; i < argc; ++i) {
        test_type(type_of(argv[i]));
        printf("%s: largest NMSE %.1e\n", argv[i], worst[type_of(argv[i])]);
    }
    printf("%d checks, %d failed\n", n_done, n_failed);
    return n_failed != 0 || n_done == 0;
}
