// Planted faults, one of each kind that the emulator has to detect. Input: the name of one. Output: the Fault and
// status 1, or "nothing found" and status 0. The expected messages: tests/devices/test_cuda_emulator.py.

#include <cuda_bf16.h>

#include <cstdio>
#include <map>
#include <string>

using namespace cuda_emulator;

__global__ void copy(const float * x, float * y, int shift) {
    const int i = int(threadIdx.x);
    y[i]        = x[i + shift];
}

__global__ void copy_shifted(const float * x, float * y, int shift) {
    const int i  = int(threadIdx.x);
    y[i + shift] = x[i];
}

__global__ void write_through(float ** y) {
    y[0][threadIdx.x] = 1.0f;
}

__global__ void copy_vectors(const float * x, float * y) {
    const float4 v = *reinterpret_cast<const float4 *>(x + threadIdx.x);
    y[threadIdx.x] = v.w;
}

// A pointer, so that the compiler does not know the array's size.
__device__ __noinline__ void store(float * s, int i) {
    s[i] = 1.0f;
}

__global__ void write_static_shared(float * y, int shift) {
    __shared__ float s[32];
    store(s, int(threadIdx.x) + shift);
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

__global__ void write_indexed_shared(float * y, int shift) {
    __shared__ float s[4][8];
    s[threadIdx.x / 8][threadIdx.x % 8 + shift] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x / 8][threadIdx.x % 8];
}

__global__ void write_dynamic_shared(float * y, int shift) {
    extern __shared__ float s[];
    s[int(threadIdx.x) + shift] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

__global__ void early_return(float * y, unsigned n) {
    if (threadIdx.x >= n) {
        return;
    }
    __syncthreads();
    y[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(float * y) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    y[threadIdx.x] = 1.0f;
}

__global__ void two_shuffles(float * y) {
    float v = float(threadIdx.x);
    if (threadIdx.x < 16) {
        v = __shfl_xor_sync(0xffffffff, v, 1);
    } else {
        v = __shfl_xor_sync(0xffffffff, v, 1);
    }
    y[threadIdx.x] = v;
}

__global__ void left_out(float * y) {
    y[threadIdx.x] = __shfl_sync(0x0000ffff, 1.0f, 0);
}

__global__ void shuffle_or_barrier(float * y) {
    float v = 1.0f;
    if (threadIdx.x == 5) {
        __syncthreads();
    } else {
        v = __shfl_sync(0xffffffff, v, 0);
        __syncthreads();
    }
    y[threadIdx.x] = v;
}

__global__ void half_a_product(float * y) {
    float    d[4] = {};
    uint32_t a[4] = {}, b[2] = {};
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    y[threadIdx.x] = d[0];
}

__global__ void unknown_instruction(int * y) {
    int a;
    asm("vabsdiff4.u32.u32.u32 %0, %1, %2, %3;" : "=r"(a) : "r"(1), "r"(2), "r"(3));
    y[threadIdx.x] = a;
}

__global__ void misaligned_matrix(const float * x, float * y) {
    __shared__ __align__(16) float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    uint32_t r;
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r)
                 : "r"((unsigned) __cvta_generic_to_shared(s + threadIdx.x % 8)));
    y[threadIdx.x] = __uint_as_float(r);
}

__global__ void async_forgotten(const float * x) {
    __shared__ __align__(16) float s[128];
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"((unsigned) __cvta_generic_to_shared(s + 4 * threadIdx.x)), "l"(x));
    asm volatile("cp.async.commit_group;");
}

__global__ void async_misaligned(const float * x) {
    __shared__ __align__(16) float s[128];
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;"
                 :
                 : "r"((unsigned) __cvta_generic_to_shared(s + 4 * threadIdx.x)), "l"(x + 1));
    asm volatile("cp.async.wait_all;");
}

__global__ void deep(float * y, int n) {
    volatile float a[40000];
    for (int i = 0; i < n; i++) {
        a[i] = float(i);
    }
    y[0] = a[n / 2];
}

__global__ void divide(int * y, int n) {
    y[0] = 7 / n;
}

__global__ void shift(int * y, int n) {
    y[0] = 7 << n;
}

__global__ void never_waits(float * y) {
    if (threadIdx.x > 0) {
        asm volatile("griddepcontrol.wait;" : : : "memory");
    }
    y[0] = 1.0f;
}

// Shared memory that no thread has written, or that a copy has not reached, is NaN.
__global__ void unwritten(float * y, const float * x) {
    __shared__ __align__(16) float s[128], copied[128];
    if (threadIdx.x > 0) {
        s[threadIdx.x] = 1.0f;
    }
    copied[4 * threadIdx.x] = 1.0f;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"((unsigned) __cvta_generic_to_shared(copied + 4 * threadIdx.x)), "l"(x));
    __syncthreads();
    y[threadIdx.x]      = s[threadIdx.x];
    y[threadIdx.x + 32] = copied[4 * threadIdx.x];
    asm volatile("cp.async.wait_all;");
}

// Without a barrier, and with two blocks and two streams in any order.
__global__ void leans_on_order(float * y, float * first) {
    __shared__ float s[32];
    s[threadIdx.x] = float(threadIdx.x);
    y[threadIdx.x] = s[31 - threadIdx.x];
    *first         = isnan(*first) ? float(blockIdx.x) : *first;
}

static void compare_orders(bool lanes, bool blocks) {
    std::vector<float> first;
    in_all_orders([&](const char *) {
        DeviceArray<float> y(32), z(1), of_blocks(1);
        Stream             main, side;
        leans_on_order<<<2, 32>>>(y.data(), of_blocks.data());
        cudaMemsetAsync(z.data(), 0, 4, side.get());
        cudaMemsetAsync(z.data(), 1, 4, main.get());
        cudaStreamSynchronize(main.get());
        cudaStreamSynchronize(side.get());
        const std::vector<float> got = lanes ? y.values() : blocks ? of_blocks.values() : z.values();
        if (!first.empty() && memcmp(first.data(), got.data(), got.size() * sizeof(float)) != 0) {
            throw Fault("the result depends on the order");
        }
        first = got;
    });
}

// Races in shared memory, which only a program that is compiled for them detects.

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

// Correct: adjacent bytes of different threads; reads by all; barriers of the warp and of the block.
__global__ void ordered(float * y) {
    __shared__ signed char   bytes[128];
    __shared__ __nv_bfloat16 s[128];
    const unsigned           i = threadIdx.x;
    bytes[i]                   = (signed char) i;
    s[i]                       = float(i);
    __syncwarp();
    const float near = float(s[i ^ 1]) + float(bytes[i ^ 1]);
    __syncthreads();
    const float all = float(s[i / 64 * 64]) + float(s[i]) + float(bytes[127 - i]);
    __syncthreads();
    s[127 - i] = near + all;
    __syncthreads();
    y[i] = s[i];
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

static void leave_work(float * y) {
    Stream main, side;
    cudaMemsetAsync(y, 0, 4, side.get());
    main.finish();
}

static float * freed_buffer() {
    float * buffer;
    cudaMalloc(&buffer, 128);
    cudaFree(buffer);
    return buffer;
}

static void run(const std::string & name) {
    DeviceArray<float> x(32), y(64), longer(128);
    int *              numbers = reinterpret_cast<int *>(y.data());
    float              host[32];

    const std::map<std::string, std::function<void()>> faults = {
        { "none", [&] { copy<<<1, 32>>>(x.data(), y.data(), 0); } },
        { "read behind a buffer", [&] { copy<<<1, 32>>>(x.data(), y.data(), 1); } },
        { "read before a buffer", [&] { copy<<<1, 32>>>(x.data(), y.data(), -1); } },
        { "write behind a buffer", [&] { copy_shifted<<<1, 32>>>(x.data(), y.data(), 33); } },
        { "a freed buffer",
          [&] {
              DeviceArray<float *> pointers(std::vector<float *>{ freed_buffer() });  // not checked by launches
              write_through<<<1, 32>>>(pointers.data());
          } },
        { "memory of the host", [&] { copy<<<1, 32>>>(x.data(), host, 0); } },
        { "misaligned vectors", [&] { copy_vectors<<<1, 16>>>(x.data(), y.data()); } },
        { "behind a shared array", [&] { write_static_shared<<<1, 32>>>(y.data(), 1); } },
        { "before a shared array", [&] { write_static_shared<<<1, 32>>>(y.data(), -1); } },
        { "an index of two", [&] { write_indexed_shared<<<1, 32>>>(y.data(), 1); } },
        { "behind dynamic shared", [&] { write_dynamic_shared<<<1, 32, 128>>>(y.data(), 1); } },
        { "too much dynamic shared", [&] { write_dynamic_shared<<<1, 32, 49 * 1024>>>(y.data(), 0); } },
        { "a return before a barrier", [&] { early_return<<<1, 64>>>(y.data(), 40); } },
        { "two barriers", [&] { two_barriers<<<1, 64>>>(y.data()); } },
        { "two shuffles", [&] { two_shuffles<<<1, 32>>>(y.data()); } },
        { "a lane outside of a mask", [&] { left_out<<<1, 32>>>(y.data()); } },
        { "a deadlock", [&] { shuffle_or_barrier<<<1, 32>>>(y.data()); } },
        { "half a warp's product", [&] { half_a_product<<<1, 16>>>(y.data()); } },
        { "unknown PTX", [&] { unknown_instruction<<<1, 32>>>(numbers); } },
        { "a misaligned matrix", [&] { misaligned_matrix<<<1, 32>>>(x.data(), y.data()); } },
        { "a copy never waited for", [&] { async_forgotten<<<1, 32>>>(x.data()); } },
        { "a misaligned copy", [&] { async_misaligned<<<1, 32>>>(x.data()); } },
        { "a deep stack", [&] { deep<<<1, 1>>>(y.data(), 40000); } },
        { "a division by zero", [&] { divide<<<1, 1>>>(numbers, 0); } },
        { "a shift too far", [&] { shift<<<1, 1>>>(numbers, 32); } },
        { "unwritten shared memory",
          [&] {
              unwritten<<<1, 32>>>(y.data(), x.data());
              const std::vector<float> got = y.values();
              for (size_t i = 0; i < got.size(); i++) {
                  if (isnan(got[i]) != (i == 0 || i >= 32)) {
                      throw std::runtime_error("NaN elsewhere");
                  }
              }
              throw Fault("NaN");
          } },
        { "the order of lanes", [] { compare_orders(true, false); } },
        { "the order of blocks", [] { compare_orders(false, true); } },
        { "the order of streams", [] { compare_orders(false, false); } },
        { "no wait for the previous kernel", [&] { launch_early(never_waits, y.data()); } },
        { "work left in a stream", [&] { leave_work(y.data()); } },
        { "no_barrier", [&] { no_barrier<<<1, 128>>>(longer.data()); } },
        { "overwritten", [&] { overwritten<<<1, 128>>>(longer.data()); } },
        { "only_a_shuffle", [&] { only_a_shuffle<<<1, 32>>>(longer.data()); } },
        { "only_the_warp", [&] { only_the_warp<<<1, 64>>>(longer.data()); } },
        { "all_write", [&] { all_write<<<1, 32>>>(longer.data()); } },
        { "copied", [&] { copied<<<1, 32>>>(longer.data(), longer.data()); } },
        { "matrix", [&] { matrix<<<1, 32>>>(longer.data()); } },
        { "too_early", [&] { launch_early(too_early, longer.data()); } },
        { "ordered", [&] { ordered<<<3, 128>>>(longer.data()); } },
    };
    faults.at(name)();
}

int main(int, char ** arguments) {
    try {
        run(arguments[1]);
    } catch (const Fault & fault) {
        printf("%s\n", fault.what());
        return 1;
    }
    printf("nothing found\n");
}
