// Tensor-core instructions against plain loops, on matrices without any symmetry. Fragments are filled according to the
// PTX ISA for each shape and type, element by element; the kernels do not use the emulator's own formulas.

#include "../check.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

using namespace cuda_emulator;

// One instruction each. A fragment's elements are counted as the PTX ISA does ("Matrix Fragments for mma.m16n8k16 with
// floating point type" and the other shapes'): a_row(g, i) is the row of ai, with g = lane / 4 and t = lane % 4.
template <class T> struct Wide16 {  // 16-bit types, K = 16
    using Element           = T;
    using Sum               = float;
    static constexpr int  K = 16;
    static __device__ int a_row(int g, int i) { return i < 2 || (i >= 4 && i < 6) ? g : g + 8; }
    static __device__ int a_column(int t, int i) { return t * 2 + (i & 1) + (i >= 4 ? 8 : 0); }
    static __device__ int b_row(int t, int i) { return t * 2 + (i & 1) + (i >= 2 ? 8 : 0); }
};

template <class T> struct Narrow16 {  // 16-bit types, K = 8
    using Element           = T;
    using Sum               = float;
    static constexpr int  K = 8;
    static __device__ int a_row(int g, int i) { return i < 2 ? g : g + 8; }
    static __device__ int a_column(int t, int i) { return t * 2 + (i & 1); }
    static __device__ int b_row(int t, int i) { return t * 2 + i; }
};

struct Bf16K16 : Wide16<__nv_bfloat16> {
    static __device__ void product(float * d, const uint32_t * a, const uint32_t * b) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

struct F16K16 : Wide16<__half> {
    static __device__ void product(float * d, const uint32_t * a, const uint32_t * b) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(d[0]), "f"(d[1]), "f"(d[2]),
              "f"(d[3]));
    }
};

struct Bf16K8 : Narrow16<__nv_bfloat16> {
    static __device__ void product(float * d, const uint32_t * a, const uint32_t * b) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    }
};

struct F16K8 : Narrow16<__half> {
    static __device__ void product(float * d, const uint32_t * a, const uint32_t * b) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    }
};

// Sums in f16, for which the kernel's float sums are rounded.
struct F16SumsK16 : Wide16<__half> {
    static __device__ void product(float * d, const uint32_t * a, const uint32_t * b) {
        __half2 c[2] = { __floats2half2_rn(d[0], d[1]), __floats2half2_rn(d[2], d[3]) };
        auto *  r    = reinterpret_cast<uint32_t *>(c);
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
                     : "+r"(r[0]), "+r"(r[1])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        for (int i = 0; i < 4; i++) {
            d[i] = __half2float(i % 2 ? c[i / 2].y : c[i / 2].x);
        }
    }
};

struct Tf32K8 {
    using Element            = float;
    using Sum                = float;
    static constexpr int   K = 8;
    static __device__ int  a_row(int g, int i) { return i == 0 || i == 2 ? g : g + 8; }
    static __device__ int  a_column(int t, int i) { return i < 2 ? t : t + 4; }
    static __device__ int  b_row(int t, int i) { return i == 0 ? t : t + 4; }
    static __device__ void product(float * d, const uint32_t * a, const uint32_t * b) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

struct Tf32K4 {
    using Element            = float;
    using Sum                = float;
    static constexpr int   K = 4;
    static __device__ int  a_row(int g, int i) { return i == 0 ? g : g + 8; }
    static __device__ int  a_column(int t, int) { return t; }
    static __device__ int  b_row(int t, int) { return t; }
    static __device__ void product(float * d, const uint32_t * a, const uint32_t * b) {
        asm volatile("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    }
};

struct S8K32 {
    using Element            = int8_t;
    using Sum                = int;
    static constexpr int   K = 32;
    static __device__ int  a_row(int g, int i) { return i < 4 || (i >= 8 && i < 12) ? g : g + 8; }
    static __device__ int  a_column(int t, int i) { return t * 4 + (i & 3) + (i >= 8 ? 16 : 0); }
    static __device__ int  b_row(int t, int i) { return t * 4 + (i & 3) + (i >= 4 ? 16 : 0); }
    static __device__ void product(int * d, const uint32_t * a, const uint32_t * b) {
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

struct S8K16 {
    using Element            = int8_t;
    using Sum                = int;
    static constexpr int   K = 16;
    static __device__ int  a_row(int g, int i) { return i < 4 ? g : g + 8; }
    static __device__ int  a_column(int t, int i) { return t * 4 + (i & 3); }
    static __device__ int  b_row(int t, int i) { return t * 4 + i; }
    static __device__ void product(int * d, const uint32_t * a, const uint32_t * b) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    }
};

// out = A B + in; A is 16 x K, B is K x 8, row-major. c0, c1 are in row g, c2, c3 in row g + 8, columns 2 t, 2 t + 1.
template <class I>
__global__ void multiply_with(const typename I::Element * A,
                              const typename I::Element * B,
                              const typename I::Sum *     in,
                              typename I::Sum *           out) {
    typename I::Element a[16 * I::K / 32], b[8 * I::K / 32];
    typename I::Sum     d[4];
    uint32_t            x[sizeof(a) / 4], y[sizeof(b) / 4];
    const int           g = int(threadIdx.x) >> 2, t = int(threadIdx.x) % 4;
    for (int i = 0; i < 16 * I::K / 32; i++) {
        a[i] = A[I::a_row(g, i) * I::K + I::a_column(t, i)];
    }
    for (int i = 0; i < 8 * I::K / 32; i++) {
        b[i] = B[I::b_row(t, i) * 8 + g];
    }
    for (int i = 0; i < 4; i++) {
        d[i] = in[(i < 2 ? g : g + 8) * 8 + t * 2 + (i & 1)];
    }
    memcpy(x, a, sizeof(a));
    memcpy(y, b, sizeof(b));
    I::product(d, x, y);
    for (int i = 0; i < 4; i++) {
        out[(i < 2 ? g : g + 8) * 8 + t * 2 + (i & 1)] = d[i];
    }
}

// Numbers that each type represents exactly and whose products are summed exactly: any difference is an indexing error.
template <class T> std::vector<T> random_values(size_t n, unsigned seed) {
    std::mt19937                       random(seed);
    std::uniform_int_distribution<int> number(-60, 60);
    std::vector<T>                     values(n);
    for (T & value : values) {
        value = T(number(random));
    }
    return values;
}

template <class I> void check_product(double limit = 0.0) {
    using T          = typename I::Element;
    using S          = typename I::Sum;
    const auto     A = random_values<T>(16 * I::K, 1), B = random_values<T>(I::K * 8, 2);
    const auto     C = random_values<S>(16 * 8, 3);
    DeviceArray<T> a(A), b(B);
    DeviceArray<S> in(C), out(C.size());
    multiply_with<I><<<1, 32>>>(a.data(), b.data(), in.data(), out.data());
    const std::vector<S> got = out.values();
    for (int row = 0; row < 16; row++) {
        for (int column = 0; column < 8; column++) {
            double sum = double(C[row * 8 + column]);
            for (int k = 0; k < I::K; k++) {
                sum += double(A[row * I::K + k]) * double(B[k * 8 + column]);
            }
            CHECK(std::fabs(double(got[row * 8 + column]) - sum) <= limit * std::fabs(sum));
        }
    }
}

// The bits of a tf32 register after 10 bits of mantissa are ignored; sums are truncated to float.
static void check_rounding() {
    std::vector<float> A(16 * 8), B(8 * 8), C(16 * 8, 1.0f);
    for (float & value : A) {
        value = 1.0f + 0x1p-11f;
    }
    B[0] = 1.0f;        // column 0 is A's first column, once
    B[1] = 0x1.8p-24f;  // column 1: a quarter less than the last bit of 1.0
    C[1] = 1.0f;
    DeviceArray<float> a(A), b(B), in(C), out(C.size());
    multiply_with<Tf32K8><<<1, 32>>>(a.data(), b.data(), in.data(), out.data());
    const std::vector<float> got = out.values();
    CHECK(got[0] == 2.0f);
    CHECK(got[1] == 1.0f);  // round to nearest would be the next float
}

// Matrix m of 8 x 8 halves starts at row 8 m; the address of a lane is that of row `lane`.
template <int N, bool TRANSPOSED> __global__ void load(const uint16_t * x, uint32_t * out, uint16_t * stored) {
    __shared__ __align__(16) uint16_t s[8 * N][8], back[8 * N][8];
    const int                         lane = int(threadIdx.x);
    for (int i = lane; i < 64 * N; i += 32) {
        s[i / 8][i % 8] = x[i];
    }
    __syncwarp();
    uint32_t       r[4] = {};
    const unsigned at   = (unsigned) __cvta_generic_to_shared(s[lane % (8 * N)]);
    const unsigned to   = (unsigned) __cvta_generic_to_shared(back[lane % (8 * N)]);
    if constexpr (N == 1 && !TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at));
        asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" : : "r"(to), "r"(r[0]));
    } else if constexpr (N == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at));
        asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" : : "r"(to), "r"(r[0]));
    } else if constexpr (N == 2 && !TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared::cta.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(at));
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" : : "r"(to), "r"(r[0]), "r"(r[1]));
    } else if constexpr (N == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(at));
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
                     :
                     : "r"(to), "r"(r[0]), "r"(r[1]));
    } else if constexpr (!TRANSPOSED) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + 0];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at));
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                     :
                     : "r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(at));
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                     :
                     : "r"(to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]));
    }
    for (int m = 0; m < N; m++) {
        out[4 * lane + m] = r[m];
    }
    __syncwarp();
    for (int i = lane; i < 64 * N; i += 32) {
        stored[i] = back[i / 8][i % 8];
    }
}

template <int N, bool TRANSPOSED> void check_load() {
    std::vector<uint16_t> x(64 * N);
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = uint16_t(i * 40503 + 7);  // all different
    }
    DeviceArray<uint16_t> from(x), stored(x.size());
    DeviceArray<uint32_t> out(128);
    load<N, TRANSPOSED><<<1, 32>>>(from.data(), out.data(), stored.data());
    const std::vector<uint32_t> got = out.values();
    for (int lane = 0; lane < 32; lane++) {
        for (int m = 0; m < N; m++) {
            for (int i = 0; i < 2; i++) {  // lane l: row l / 4, elements 2 (l % 4) and the next; or its transpose
                const int row = lane / 4, column = lane % 4 * 2 + i;
                const int at = 64 * m + (TRANSPOSED ? column * 8 + row : row * 8 + column);
                CHECK(uint16_t(got[4 * lane + m] >> 16 * i) == x[at]);
            }
        }
    }
    CHECK(stored.values() == x);
}

__global__ void transpose_registers(const uint32_t * x, uint32_t * out) {
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out[threadIdx.x]) : "r"(x[threadIdx.x]));
}

static void check_transposed() {
    std::vector<uint16_t> x(64);
    for (size_t i = 0; i < x.size(); i++) {
        x[i] = uint16_t(i * 40503 + 7);
    }
    std::vector<uint32_t> registers(32);
    memcpy(registers.data(), x.data(), 128);  // row l / 4, elements 2 (l % 4), +1: memory order
    DeviceArray<uint32_t> from(registers), to(32);
    transpose_registers<<<1, 32>>>(from.data(), to.data());
    const std::vector<uint32_t> got = to.values();
    for (int i = 0; i < 64; i++) {
        CHECK(uint16_t(got[i / 2] >> 16 * (i % 2)) == x[i % 8 * 8 + i / 8]);
    }
}

int main() {
    in_all_orders([](const char *) {
        check_product<Bf16K16>();
        check_product<Bf16K8>();
        check_product<F16K16>();
        check_product<F16K8>();
        check_product<F16SumsK16>(0x1p-10);
        check_product<Tf32K8>();
        check_product<Tf32K4>();
        check_product<S8K32>();
        check_product<S8K16>();
        check_rounding();
        check_load<1, false>();
        check_load<1, true>();
        check_load<2, false>();
        check_load<2, true>();
        check_load<4, false>();
        check_load<4, true>();
        check_transposed();
    });
    printf("all as it should be\n");
}
