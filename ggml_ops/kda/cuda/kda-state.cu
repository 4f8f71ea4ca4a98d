// Copies states: new ones of long batches from the result to the cache, if rows conflict (kda-device.cuh); and rows of the cache that move to other cells.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kda-device.cuh"
#include "kimi-launch.cuh"

namespace kda_cuda {

constexpr int COPY_THREADS = 256;

static __device__ __forceinline__ void copy_state(const float * from, float * to, int64_t size) {
    for (int64_t i = 4 * (blockIdx.x * COPY_THREADS + threadIdx.x); i < size; i += 4 * COPY_THREADS * gridDim.x) {
        store4(to + i, load4(from + i));
    }
}

static __global__ void __launch_bounds__(COPY_THREADS) copy_states_kernel(const states st, const int64_t size) {
    wait_for_previous();
    if (!rows_conflict(st)) {
        return;
    }
    const int seq  = blockIdx.y;
    const int slot = blockIdx.z;
    copy_state(st.result.at(seq, slot), st.in_cache.at(seq, slot), size);
}

static __global__ void __launch_bounds__(COPY_THREADS)
    gather_states_kernel(const float * cache, const int32_t * rows, const int64_t size, float * out) {
    wait_for_previous();
    copy_state(cache + rows[blockIdx.y] * size, out + blockIdx.y * size, size);
}

static unsigned blocks_of(int64_t size) {
    const int64_t n_blocks = (size / 4 + COPY_THREADS - 1) / COPY_THREADS;
    return n_blocks < 64 ? n_blocks : 64;
}

void gather_states(
    const float * cache, const int32_t * rows, int64_t n, int64_t size, float * out, cudaStream_t stream) {
    const dim3 grid(blocks_of(size), n);
    launch_early<gather_states_kernel>(grid, COPY_THREADS, 0, stream, cache, rows, size, out);
}

void copy_states(const states & st, int64_t size, int n_slots, cudaStream_t stream) {
    if (st.in_cache.data == nullptr || st.n_seqs == 1) {
        return;
    }
    const dim3 grid(blocks_of(size), st.n_seqs, n_slots);
    launch_early<copy_states_kernel>(grid, COPY_THREADS, 0, stream, st, size);
}

}  // namespace kda_cuda

#endif
