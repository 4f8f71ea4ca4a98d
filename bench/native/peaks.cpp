// Measures peak rates of this machine for a number of threads: bytes read from memory and multiply-adds, per second.
//
//   peaks THREADS [SECONDS]     prints one line of JSON
//
// Vectors are GCC's and Clang's vector extensions; int8 and bf16 use the CPU's own instructions, the faster of those for
// vectors and for tile registers (AMX, in programs for AVX-512), and are null without them.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#if defined(__AVX512VNNI__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAVE_TILES 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

using clock_type = std::chrono::steady_clock;

// one register wide, with enough accumulators to hide the latency without spilling
#if defined(__AVX512F__)
static constexpr int WIDTH = 64, ACCUMULATORS = 24;
#elif defined(__AVX__)
static constexpr int WIDTH = 32, ACCUMULATORS = 12;
#else
static constexpr int WIDTH = 16, ACCUMULATORS = 12;
#endif

typedef float    floats __attribute__((vector_size(WIDTH)));
typedef uint64_t words __attribute__((vector_size(WIDTH)));

#if defined(__x86_64__)
#define IN_REGISTER "+x"
#else
#define IN_REGISTER "+w"
#endif

template <typename T> static void keep(T & value) {  // makes the compiler assume that value is used and changed
    asm volatile("" : "+m"(value) : : "memory");
}

// Multiply-adds in registers only: Step adds the products of two vectors to a vector of sums.
template <typename Step> struct Products {
    using Sums   = typename Step::Sums;
    using Vector = typename Step::Vector;

    Sums   sums[ACCUMULATORS] = {};
    Vector a = {}, b = {};

    double turn(int64_t count) {
        Sums s[ACCUMULATORS];
#pragma GCC unroll 24
        for (int j = 0; j < ACCUMULATORS; ++j) {
            s[j] = sums[j];
        }
        Vector x = a, y = b;
        for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 24
            for (int j = 0; j < ACCUMULATORS; ++j) {
                s[j] = Step::add(s[j], x, y);
            }
            asm volatile("" : IN_REGISTER(x), IN_REGISTER(y));  // prevents the compiler from hoisting the computation
        }
#pragma GCC unroll 24
        for (int j = 0; j < ACCUMULATORS; ++j) {
            sums[j] = s[j];
        }
        keep(sums);
        return (double) count * ACCUMULATORS * Step::products;
    }
};

struct FloatStep {
    using Sums                    = floats;
    using Vector                  = floats;
    static constexpr int products = WIDTH / sizeof(float);

    static floats add(floats s, floats x, floats y) { return s + x * y; }  // contracted if there is an instruction
};

#if defined(__AVX512VNNI__)
#define HAVE_INT8 4 * 16
typedef __m512i   int_vector;
static int_vector int8_add(int_vector s, int_vector a, int_vector b) {
    return _mm512_dpbusd_epi32(s, a, b);
}
#elif defined(__AVXVNNI__)
#define HAVE_INT8 4 * 8
typedef __m256i   int_vector;
static int_vector int8_add(int_vector s, int_vector a, int_vector b) {
    return _mm256_dpbusd_avx_epi32(s, a, b);
}
#elif defined(__AVX2__)
#define HAVE_INT8 4 * 8
typedef __m256i int_vector;
// Sums of 16 bits, the fastest form. As an intrinsic, the product would be computed once for all sums.
static int_vector int8_add(int_vector s, int_vector a, int_vector b) {
    int_vector products;
    asm volatile("vpmaddubsw %2, %1, %0" : "=x"(products) : "x"(a), "x"(b));
    return _mm256_add_epi16(s, products);
}
#elif defined(__ARM_FEATURE_DOTPROD)
#define HAVE_INT8 4 * 4
typedef int8x16_t int_vector;
static int_vector int8_add(int_vector s, int_vector a, int_vector b) {
    return vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(s), a, b));
}
#endif

#if defined(__AVX512BF16__)
#define HAVE_BF16 2 * 16
typedef __m512   bf16_sums;
typedef __m512bh bf16_vector;
static bf16_sums bf16_add(bf16_sums s, bf16_vector a, bf16_vector b) {
    return _mm512_dpbf16_ps(s, a, b);
}
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAVE_BF16 2 * 4
typedef float32x4_t  bf16_sums;
typedef bfloat16x8_t bf16_vector;
static bf16_sums     bf16_add(bf16_sums s, bf16_vector a, bf16_vector b) {
    return vbfdotq_f32(s, a, b);
}
#endif

#ifdef HAVE_INT8
struct Int8Step {
    using Sums                    = int_vector;
    using Vector                  = int_vector;
    static constexpr int products = HAVE_INT8;

    static int_vector add(int_vector s, int_vector x, int_vector y) { return int8_add(s, x, y); }
};
static_assert(Int8Step::products == 4 * FloatStep::products, "a vector has four times as many bytes as floats");
#endif

#ifdef HAVE_BF16
struct Bf16Step {
    using Sums                    = bf16_sums;
    using Vector                  = bf16_vector;
    static constexpr int products = HAVE_BF16;

    static bf16_sums add(bf16_sums s, bf16_vector x, bf16_vector y) { return bf16_add(s, x, y); }
};
static_assert(Bf16Step::products == 2 * FloatStep::products, "a vector has twice as many bf16 as floats");
#endif

#ifdef HAVE_TILES
// Whether the CPU has tile registers, and Linux lets this process use them.
static bool has_tiles() {
    constexpr unsigned REQUIRED = 1u << 22 | 1u << 24 | 1u << 25;  // CPUID 7, EDX: AMX-BF16, AMX-TILE, AMX-INT8
    constexpr int      REQUEST = 0x1023, TILE_DATA = 18;           // ARCH_REQ_XCOMP_PERM
    unsigned           a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & REQUIRED) == REQUIRED &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// Products of two tiles by two, all of 16 rows of 64 bytes.
template <bool BF16> struct TileProducts {
    double turn(int64_t count) {
        alignas(64) uint8_t shapes[64] = { 1 };
        for (int t = 0; t < 8; ++t) {
            shapes[16 + 2 * t] = 64;
            shapes[48 + t]     = 16;
        }
        asm volatile("ldtilecfg %0" : : "m"(shapes));
        for (int64_t i = 0; i < count; ++i) {
            if (BF16) {
                asm volatile(
                    "tdpbf16ps %tmm6, %tmm4, %tmm0\n tdpbf16ps %tmm7, %tmm4, %tmm1\n"
                    "tdpbf16ps %tmm6, %tmm5, %tmm2\n tdpbf16ps %tmm7, %tmm5, %tmm3");
            } else {
                asm volatile(
                    "tdpbssd %tmm6, %tmm4, %tmm0\n tdpbssd %tmm7, %tmm4, %tmm1\n"
                    "tdpbssd %tmm6, %tmm5, %tmm2\n tdpbssd %tmm7, %tmm5, %tmm3");
            }
        }
        asm volatile("tilerelease");
        return (double) count * 4 * 16 * 16 * (BF16 ? 32 : 64);
    }
};
#endif

// Bytes that each thread reads: more than any cache, and all threads together at most 4 GiB.
static size_t bytes_of_each(int n_threads) {
    return std::min((size_t) 256 << 20, ((size_t) 4 << 30) / n_threads);
}

// Reads the memory of a thread repeatedly; counts bytes.
struct Reading {
    explicit Reading(int n_threads) : data(bytes_of_each(n_threads) / WIDTH / 8 * 8, words{} + 1) {}

    std::vector<words> data;
    size_t             at = 0;

    double turn(int64_t count) {
        words        s[8] = {};
        const size_t n    = (size_t) count * 8 < data.size() ? (size_t) count * 8 : data.size();
        if (at + n > data.size()) {
            at = 0;
        }
        for (const words *p = data.data() + at, *end = p + n; p < end; p += 8) {
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                s[j] += p[j];
            }
        }
        at += n;
        for (words & each : s) {
            keep(each);
        }
        return (double) n * WIDTH;
    }
};

// Units per second over all threads, the best of several intervals of `seconds`.
template <typename Work> static double rate(int n_threads, double seconds, const Work & of_each = Work()) {
    double            best = 0.0;
    std::vector<Work> work(n_threads, of_each);
    for (int stretch = 0; stretch < 3; ++stretch) {
        std::atomic<int>         ready{ 0 };
        std::vector<double>      done(n_threads), took(n_threads);
        std::vector<std::thread> threads;
        for (int t = 0; t < n_threads; ++t) {
            threads.emplace_back([&, t] {
                ++ready;
                while (ready < n_threads) {
                }
                const auto began = clock_type::now();
                do {
                    done[t] += work[t].turn(20000);
                    took[t] = std::chrono::duration<double>(clock_type::now() - began).count();
                } while (took[t] < seconds);
            });
        }
        double sum = 0.0;
        for (int t = 0; t < n_threads; ++t) {
            threads[t].join();
            sum += done[t] / took[t];
        }
        best = sum > best ? sum : best;
    }
    return best;
}

// Of vectors, or of tiles if they are faster.
template <typename Vectors, bool BF16> static double faster_rate(int n_threads, double seconds) {
    const double vectors = rate<Vectors>(n_threads, seconds);
#ifdef HAVE_TILES
    if (has_tiles()) {
        return std::max(vectors, rate<TileProducts<BF16>>(n_threads, seconds));
    }
#endif
    return vectors;
}

int main(int argc, char ** argv) {
    const int    n_threads = argc > 1 ? atoi(argv[1]) : 1;
    const double seconds   = argc > 2 ? atof(argv[2]) : 0.5;
    if (n_threads < 1 || !(seconds > 0)) {
        fprintf(stderr, "peaks THREADS [SECONDS]\n");
        return 2;
    }
    const double read = rate(n_threads, seconds, Reading(n_threads));
    printf("{\"threads\": %d, \"read\": %.6g, \"f32\": %.6g", n_threads, read,
           rate<Products<FloatStep>>(n_threads, seconds));
#ifdef HAVE_INT8
    printf(", \"int8\": %.6g", faster_rate<Products<Int8Step>, false>(n_threads, seconds));
#else
    printf(", \"int8\": null");
#endif
#ifdef HAVE_BF16
    printf(", \"bf16\": %.6g", faster_rate<Products<Bf16Step>, true>(n_threads, seconds));
#else
    printf(", \"bf16\": null");
#endif
    printf("}\n");
    return 0;
}
