// Device features other than tensor cores: each against a plain loop, in all orders of lanes, warps and blocks.

#include "../check.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <vector>

using namespace cuda_emulator;

constexpr int THREADS = 96;  // three warps

__global__ void shuffles(int * out) {
    const int thread = int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
    const int value  = 1000 + thread;
    int *     to     = out + 8 * thread;
    to[0]            = __shfl_sync(0xffffffff, value, 5);
    to[1]            = __shfl_sync(0xffffffff, value, thread + 3, 8);
    to[2]            = __shfl_xor_sync(0xffffffff, value, 9);
    to[3]            = __shfl_up_sync(0xffffffff, value, 2);
    to[4]            = __shfl_down_sync(0xffffffff, value, 3, 16);
    to[5]            = int(__ballot_sync(0xffffffff, thread % 3 == 0));
    to[6]            = __reduce_add_sync(0xffffffff, value);
    to[7]            = __reduce_max_sync(0xffffffff, -value) + __any_sync(0xffffffff, thread == 40) * 1000000 +
                       __all_sync(0xffffffff, thread >= 32) * 2000000;
}

static void check_shuffles() {
    DeviceArray<int> out(8 * THREADS);
    shuffles<<<1, dim3(4, 8, 3)>>>(out.data());
    const std::vector<int> got = out.values();
    for (int thread = 0; thread < THREADS; thread++) {
        const int first = thread / 32 * 32, lane = thread % 32;
        auto      value = [&](int of) { return 1000 + first + of; };
        unsigned  third = 0;
        int       sum   = 0;
        for (int i = 0; i < 32; i++) {
            third |= unsigned((first + i) % 3 == 0) << i;
            sum += value(i);
        }
        const int * of = &got[8 * thread];
        CHECK(of[0] == value(5));
        CHECK(of[1] == value(lane / 8 * 8 + (lane + 3) % 8));
        CHECK(of[2] == value(lane ^ 9));
        CHECK(of[3] == value(lane < 2 ? lane : lane - 2));
        CHECK(of[4] == value(lane % 16 + 3 > 15 ? lane : lane + 3));
        CHECK(unsigned(of[5]) == third);
        CHECK(of[6] == sum);
        CHECK(of[7] == -value(0) + (first == 32) * 1000000 + (first >= 32) * 2000000);
    }
}

// Halves of a warp shuffle independently, without waiting for lanes that have ended.
__global__ void parts(int * out) {
    const int lane = int(threadIdx.x);
    if (lane >= 24) {
        return;
    }
    int value = lane;
    if (lane < 16) {
        value = __shfl_xor_sync(0x0000ffff, value, 1);
        __syncwarp(0x0000ffff);
    } else {
        value = __shfl_down_sync(0xffff0000, value, 1);
    }
    out[lane] = value;
}

static void check_parts() {
    DeviceArray<int> out(32);
    parts<<<1, 32>>>(out.data());
    const std::vector<int> got = out.values();
    for (int lane = 0; lane < 23; lane++) {
        CHECK(got[lane] == (lane < 16 ? lane ^ 1 : lane + 1));
    }
    CHECK(got[23] == -1);  // the poison from lane 24
}

template <int N> __global__ void reverse(const float4 * x, float4 * y, int * counts) {
    __shared__ float4       s[N];
    extern __shared__ float more[];
    const int               i = int(threadIdx.x);
    s[i]                      = x[blockIdx.x * N + i];
    more[i]                   = float(i);
    const int odd             = __syncthreads_count(i % 2);
    float4    v               = s[N - 1 - i];
    v.w += more[(i + 1) % N];
    y[blockIdx.x * N + i] = v;
    const int any = __syncthreads_or(i == N - 1), all = __syncthreads_and(i < N - 1);
    atomicAdd(counts, odd + 1000 * any + 100000 * all);
}

static void check_blocks() {
    constexpr int       N = 64, BLOCKS = 5;
    std::vector<float4> x(N * BLOCKS);
    for (int i = 0; i < N * BLOCKS; i++) {
        x[i] = make_float4(float(i), float(2 * i), float(3 * i), float(4 * i));
    }
    DeviceArray<float4> from(x), to(x.size());
    DeviceArray<int>    counts(std::vector<int>{ 0 });
    reverse<N><<<BLOCKS, N, N * sizeof(float)>>>(from.data(), to.data(), counts.data());
    const std::vector<float4> got = to.values();
    for (int i = 0; i < N * BLOCKS; i++) {
        const float4 & v = x[i / N * N + N - 1 - i % N];
        CHECK(got[i].x == v.x && got[i].y == v.y && got[i].z == v.z && got[i].w == v.w + float((i + 1) % N));
    }
    CHECK(counts.values()[0] == BLOCKS * N * (N / 2 + 1000));
}

// Each half of a block uses its own barrier, any number of times.
__global__ void named_barriers(int * out) {
    __shared__ int sums[2];
    const int      half = int(threadIdx.x / 64), i = int(threadIdx.x % 64);
    if (i == 0) {
        sums[half] = 0;
    }
    for (int turn = 0; turn < 3 + half; turn++) {
        asm volatile("bar.sync %0, %1;" : : "r"(half + 1), "r"(64) : "memory");
        if (i == 8 * turn) {
            sums[half] += turn + 1;
        }
    }
    __syncthreads();
    out[threadIdx.x] = sums[half];
}

static void check_named_barriers() {
    DeviceArray<int> out(128);
    named_barriers<<<1, 128>>>(out.data());
    const std::vector<int> got = out.values();
    for (int i = 0; i < 128; i++) {
        CHECK(got[i] == (i < 64 ? 6 : 10));
    }
}

// Shared memory is NaN when a block starts, also after a previous block; copies arrive at the wait.
__global__ void poison(const float * x, float * out, bool wait) {
    __shared__ __align__(16) float s[4 * 32];
    extern __shared__ float        dynamic[];
    const int                      lane  = int(threadIdx.x);
    const bool                     fresh = isnan(s[lane]) && isnan(dynamic[lane]);
    __syncwarp();
    s[4 * lane] = dynamic[lane] = 7.0f;
    __syncwarp();
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"((unsigned) __cvta_generic_to_shared(s + 4 * lane)), "l"(x + 4 * lane));
    asm volatile("cp.async.commit_group;");
    if (wait) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
    } else {
        asm volatile("cp.async.wait_group 1;" ::: "memory");  // one too few
    }
    __syncwarp();
    out[32 * blockIdx.x + lane] = fresh ? s[4 * (31 - lane) + 1] : -1.0f;
    __syncwarp();
    asm volatile("cp.async.wait_all;");
}

static void check_poison() {
    std::vector<float> x(128);
    for (int i = 0; i < 128; i++) {
        x[i] = float(i);
    }
    DeviceArray<float> from(x), to(64);
    poison<<<2, 32, 128>>>(from.data(), to.data(), true);
    const std::vector<float> got = to.values();
    for (int i = 0; i < 64; i++) {
        CHECK(got[i] == x[4 * (31 - i % 32) + 1]);
    }
    poison<<<2, 32, 128>>>(from.data(), to.data(), false);
    for (float value : to.values()) {
        CHECK(std::isnan(value));
    }
}

// Groups of copies, some reading fewer bytes than they write.
__global__ void stages(const float * x, float * out) {
    __shared__ __align__(16) float s[3][4];
    for (int stage = 0; stage < 3; stage++) {
        const unsigned given = stage == 1 ? 8 : 16;
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"((unsigned) __cvta_generic_to_shared(s[stage])), "l"(x + 4 * stage), "n"(16), "r"(given));
        asm volatile("cp.async.commit_group;");
    }
    asm volatile("cp.async.wait_group %0;" : : "n"(1));
    for (int i = 0; i < 12; i++) {
        out[i] = s[i / 4][i % 4];
    }
    asm volatile("cp.async.wait_group 0;");
    for (int i = 8; i < 12; i++) {
        out[i + 4] = s[i / 4][i % 4];
    }
}

static void check_stages() {
    const std::vector<float> x = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 };
    DeviceArray<float>       from(x), to(16);
    stages<<<1, 1>>>(from.data(), to.data());
    const std::vector<float> got = to.values();
    for (int i = 0; i < 16; i++) {
        CHECK(i < 8 ? got[i] == (i == 6 || i == 7 ? 0.0f : x[i]) : i < 12 ? std::isnan(got[i]) : got[i] == x[i - 4]);
    }
}

// Thread 40 writes.
__global__ void scalar_ptx(const float * x, uint32_t * out) {
    if (threadIdx.x != 40) {
        return;
    }
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out[0]) : "f"(x[0]));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out[1]) : "f"(x[0]), "f"(x[1]));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out[2]) : "f"(x[0]), "f"(x[1]));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=r"(out[3]) : "f"(x[2]));
    asm("prmt.b32 %0, %1, %2, 0x5410;" : "=r"(out[4]) : "r"(0x33221100), "r"(0x77665544));
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out[5]) : "r"(0x0f0f), "r"(0x00ff), "r"(0x10000));  // (a & b) | c
    asm("mov.u32 %0, %%laneid;" : "=r"(out[6]));
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(out[8]));
    out[7] = __byte_perm(0x80112233, 0x44556677, 0xb034);
}

static void check_scalar_ptx() {
    const float           tie = 1.0f + 0x1p-11f;  // half way between two tf32 values
    DeviceArray<float>    x(std::vector<float>{ tie, -3.14159f, -2.0f });
    DeviceArray<uint32_t> out(9);
    scalar_ptx<<<1, 64>>>(x.data(), out.data());
    const std::vector<uint32_t> got = out.values();
    CHECK(got[0] == bits_as<uint32_t>(1.0f + 0x1p-10f));
    CHECK(got[1] == (0x3f80u << 16 | 0xc049));
    CHECK(got[2] == (0x3c00u << 16 | 0xc248));
    CHECK(got[3] == bits_as<uint32_t>(0.25f));
    CHECK(got[4] == 0x55441100);
    CHECK(got[5] == 0x1000f);
    CHECK(got[6] == 8);
    CHECK(got[8] == 40);
    CHECK(got[7] == 0xff338077);  // bytes 4, 3, 0 and the sign of 3
}

// The value of a number of `mantissa` bits and exponent bias `bias`, by definition.
static double meaning(uint32_t bits, int mantissa, int bias) {
    const int    exponent = int(bits >> mantissa), top = 2 * bias + 1;
    const double fraction = double(bits & ((1u << mantissa) - 1)) / double(1u << mantissa);
    return exponent == top && fraction != 0 ? NAN
           : exponent == top                ? INFINITY
           : exponent == 0                  ? std::ldexp(fraction, 1 - bias)
                                            : std::ldexp(1 + fraction, exponent - bias);
}

// Every value of a 16-bit type, and floats of every magnitude, each of which must round to nearest even.
template <class T> void check_rounding(int mantissa, int bias) {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const float  value = float(bits_as<T>(uint16_t(bits)));
        const double known = std::copysign(meaning(bits & 0x7fff, mantissa, bias), bits & 0x8000 ? -1.0 : 1.0);
        CHECK(std::isnan(value) ? std::isnan(known) : double(value) == known);
        CHECK(std::isnan(value) || T(value).bits == bits);
    }
    uint32_t random = 1;
    for (int i = 0; i < 2000000; i++) {
        random             = random * 1664525 + 1013904223;
        const float    x   = bits_as<float>(random);
        const uint16_t got = T(x).bits;
        if (std::isnan(x)) {
            CHECK(std::isnan(float(T(x))));
            continue;
        }
        CHECK(got >> 15 == random >> 31);
        // infinity is in the place of the next number, 2^(bias + 1)
        auto place = [&](uint32_t bits) {
            const double value = meaning(bits, mantissa, bias);
            return std::isinf(value) ? std::ldexp(1.0, bias + 1) : value;
        };
        const uint32_t size = got & 0x7fff;
        const double   off  = std::min(std::fabs(double(x)), 1e39) - place(size);
        const double   up   = std::isinf(meaning(size, mantissa, bias)) ? INFINITY : place(size + 1) - place(size);
        const double   down = size ? place(size) - place(size - 1) : INFINITY;
        CHECK(off <= up / 2 && -off <= down / 2);
        CHECK((off != up / 2 && -off != down / 2) || size % 2 == 0);
    }
}

#if defined(CUDA_EMULATOR_RACES)
constexpr bool STOPPED_BY_RACES = true;
#else
constexpr bool STOPPED_BY_RACES = false;
#endif

// Kernels that rely on an order that devices do not guarantee: their results have to differ between orders.
__global__ void leans_on_lanes(int * out) {
    __shared__ int s[32];
    s[threadIdx.x]   = int(threadIdx.x);
    out[threadIdx.x] = s[31 - threadIdx.x];  // without a barrier
}

__global__ void leans_on_warps(int * out) {
    if (threadIdx.x % 32 == 0) {
        out[threadIdx.x / 32] = atomicAdd(out + 31, 1);
    }
}

__global__ void leans_on_blocks(int * out) {
    out[blockIdx.x] = atomicAdd(out + 31, 1);
}

__global__ void fill(int * x, int value) {
    x[threadIdx.x] = value;
}

// A stream that waits for the other one reads what that one wrote; without the wait this depends on the order.
static void check_streams() {
    for (const bool waits : { true, false }) {
        std::vector<int> results;
        in_all_orders([&](const char *) {
            DeviceArray<int> x(std::vector<int>(32, 0)), y(32);
            Stream           main, side;
            CUevent_st       forked, filled;
            cudaEventRecord(&forked, main.get());
            cudaStreamWaitEvent(side.get(), &forked);
            fill<<<1, 32, 0, side.get()>>>(x.data(), 7);
            cudaEventRecord(&filled, side.get());
            if (waits) {
                cudaStreamWaitEvent(main.get(), &filled);
            }
            cudaMemcpyAsync(y.data(), x.data(), 128, cudaMemcpyDeviceToDevice, main.get());
            cudaStreamWaitEvent(main.get(), &filled);
            CHECK(x.values()[0] == 0);  // nothing has run
            main.finish();
            results.push_back(y.values()[31]);
        });
        const bool always = results == std::vector<int>{ 7, 7, 7 };
        CHECK(always == waits);
    }
}

static void check_orders() {
    void (*const kernels[])(int *) = { leans_on_lanes, leans_on_warps, leans_on_blocks };
    const dim3 grids[] = { 1, 1, 8 }, blocks[] = { 32, 256, 1 };
    for (int i = 0; i < 3; i++) {
        std::vector<std::vector<int>> results;
        in_all_orders([&](const char *) {
            DeviceArray<int> out(std::vector<int>(32, 0));
            kernels[i]<<<grids[i], blocks[i]>>>(out.data());
            results.push_back(out.values());
        });
        CHECK(results[0] != results[1] && results[1] != results[2] && results[2] != results[0]);
    }
}

int main() {
    if (!STOPPED_BY_RACES) {
        check_orders();
    }
    check_streams();
    check_rounding<__half>(10, 15);
    check_rounding<__nv_bfloat16>(7, 127);
    CHECK(__half(1.0f + 0x1p-11f).bits == 0x3c00 && __half(1.0f + 0x3p-11f).bits == 0x3c02);  // to even
    CHECK(__nv_bfloat16(1.0f + 0x1p-8f).bits == 0x3f80 && __nv_bfloat16(1.0f + 0x3p-8f).bits == 0x3f82);
    in_all_orders([](const char *) {
        check_shuffles();
        check_parts();
        check_blocks();
        check_named_barriers();
        check_poison();
        check_stages();
        check_scalar_ptx();
    });
    printf("all as it should be\n");
}
