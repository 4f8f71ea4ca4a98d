// Planted races in shared memory, for programs compiled to detect them. Input: the name of one. Output: the Fault and
// status 1, or "nothing found" and status 0. The expected messages: tests/devices/test_cuda_races.py.

#include <cstdio>
#include <map>
#include <string>

using namespace cuda_emulator;

__global__ void no_barrier(float * y) {
    __shared__ float s[128];
    s[threadIdx.x] = 1.0f;                  // written
    y[threadIdx.x] = s[127 - threadIdx.x];  // read
}

__global__ void overwritten(float * y) {
    __shared__ float s[128];
    s[threadIdx.x] = 1.0f;
    __syncthreads();
    const float v  = s[127 - threadIdx.x];  // read by another
    s[threadIdx.x] = v + 1.0f;              // written again
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

__global__ void only_a_shuffle(float * y) {
    __shared__ float s[32];
    s[threadIdx.x] = 1.0f;  // before the shuffle
    const float v  = __shfl_xor_sync(0xffffffff, float(threadIdx.x), 1);
    y[threadIdx.x] = v + s[threadIdx.x ^ 1];  // after it
}

__global__ void only_the_warp(float * y) {
    __shared__ float s[64];
    s[threadIdx.x] = 1.0f;  // by one warp
    __syncwarp();
    y[threadIdx.x] = s[63 - threadIdx.x];  // by the other
}

__global__ void all_write(float * y) {
    __shared__ float s;
    s = 1.0f;  // all of them
    __syncthreads();
    y[threadIdx.x] = s;
}

// A warp's copies are visible only to the copying lane until __syncwarp.
__global__ void copied(const float * x, float * y) {
    __shared__ __align__(16) float s[128];
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"  // on its way
                 :
                 : "r"((unsigned) __cvta_generic_to_shared(s + 4 * threadIdx.x)), "l"(x + 4 * threadIdx.x));
    asm volatile("cp.async.wait_all;");
    y[threadIdx.x] = s[4 * (threadIdx.x ^ 1)];  // read without __syncwarp
}

__global__ void matrix(float * y) {
    __shared__ __align__(16) float s[32];
    s[31 - threadIdx.x] = 1.0f;  // by each lane
    uint32_t r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"  // by the warp
                 : "=r"(r)
                 : "r"((unsigned) __cvta_generic_to_shared(s + threadIdx.x % 8 * 4)));
    y[threadIdx.x] = __uint_as_float(r);
}

// Correct: adjacent bytes of different threads; reads by all; barriers of the warp, of the block, of a part of it.
__global__ void none(float * y) {
    __shared__ signed char   bytes[128];
    __shared__ __nv_bfloat16 s[128], t[128];
    const unsigned           i = threadIdx.x;
    bytes[i]                   = (signed char) i;
    s[i]                       = float(i);
    __syncwarp();
    const float near = float(s[i ^ 1]) + float(bytes[i ^ 1]);
    __syncthreads();
    const float all = float(s[i / 64 * 64]) + float(s[i]) + float(bytes[127 - i]);
    asm volatile("bar.sync %0, %1;" : : "r"(1 + i / 64), "n"(64) : "memory");
    t[i] = near + all;
    asm volatile("bar.sync %0, %1;" : : "r"(1 + i / 64), "n"(64) : "memory");
    s[i / 64 * 64 + (63 - i % 64)] = t[i / 64 * 64 + (63 - i % 64)];
    __syncthreads();
    y[i] = s[127 - i];
}

__global__ void too_early(float * y) {
    const float x = y[threadIdx.x];  // before the wait
    asm volatile("griddepcontrol.wait;" : : : "memory");
    y[threadIdx.x] = x;
}

static void launch_early(void (*kernel)(float *), float * y) {
    cudaLaunchAttribute attribute                        = {};
    attribute.id                                         = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    const cudaLaunchConfig_t config                      = { 1, 32, 0, nullptr, &attribute, 1 };
    cudaLaunchKernelEx(&config, kernel, y);
}

int main(int, char ** arguments) {
    DeviceArray<float> x(128), y(128);

    const std::map<std::string, std::function<void()>> races = {
        { "no_barrier", [&] { no_barrier<<<1, 128>>>(y.data()); } },
        { "overwritten", [&] { overwritten<<<1, 128>>>(y.data()); } },
        { "only_a_shuffle", [&] { only_a_shuffle<<<1, 32>>>(y.data()); } },
        { "only_the_warp", [&] { only_the_warp<<<1, 64>>>(y.data()); } },
        { "all_write", [&] { all_write<<<1, 32>>>(y.data()); } },
        { "copied", [&] { copied<<<1, 32>>>(x.data(), y.data()); } },
        { "matrix", [&] { matrix<<<1, 32>>>(y.data()); } },
        { "too_early", [&] { launch_early(too_early, y.data()); } },
        { "none", [&] { none<<<3, 128>>>(y.data()); } },
    };
    try {
        races.at(arguments[1])();
    } catch (const Fault & fault) {
        printf("%s\n", fault.what());
        return 1;
    }
    printf("nothing found\n");
}
