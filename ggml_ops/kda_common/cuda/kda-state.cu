// Copies the new states of a KDA operator from its result to the cache, where the operator could not write them itself.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kda-device.cuh"

namespace kda_cuda {

constexpr int COPY_THREADS = 256;

static __global__ void __launch_bounds__(COPY_THREADS) copy_states_kernel(const states st, const int64_t size) {
    if (writes_to_cache(st)) {
        return;
    }
    const int     seq  = blockIdx.y;
    const int     slot = blockIdx.z;
    const float * from = st.result.at(seq, slot);
    float *       to   = st.in_cache.at(seq, slot);
    for (int64_t i = 4 * (blockIdx.x * COPY_THREADS + threadIdx.x); i < size; i += 4 * COPY_THREADS * gridDim.x) {
        store4(to + i, load4(from + i));
    }
}

void copy_states(const states & st, int64_t size, int n_slots, cudaStream_t stream) {
    if (st.in_cache.data == nullptr || st.n_seqs == 1) {
        return;
    }
    const int64_t n_blocks = (size / 4 + COPY_THREADS - 1) / COPY_THREADS;
    const dim3    grid(n_blocks < 64 ? n_blocks : 64, st.n_seqs, n_slots);
    copy_states_kernel<<<grid, COPY_THREADS, 0, stream>>>(st, size);
}

}  // namespace kda_cuda

#endif
