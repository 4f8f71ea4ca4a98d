#pragma once

// Arguments of the CUDA kernels of KDA_CONV and KDA_SCAN: plain pointers and numbers; the kernels run without ggml.

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace kda_cuda {

using head_sizes    = std::integer_sequence<int, 32, 64, 96, 128, 256>;
using chunked_sizes = std::integer_sequence<int, 32, 64, 96, 128>;  // larger states do not fit in a warp's registers

// Calls f with the head size as a compile-time constant, if it is one of these sizes.
template <int... SIZES, typename F>
void with_head_size(std::integer_sequence<int, SIZES...>, int head_size, const F & f) {
    ((head_size == SIZES ? f(std::integral_constant<int, SIZES>()) : void()), ...);
}

// Rows of contiguous floats, one for each head, token and sequence; strides in floats. A product of two 32-bit numbers
// is one instruction, one of two 64-bit numbers is three.
struct rows {
    const float * data;
    int           head, token;
    int64_t       seq;

    __host__ __device__ const float * at(int h, int t, int s) const {
        return data + s * seq + (int64_t) h * head + (int64_t) t * token;
    }
};

// Slot k of sequence s is at data + s*seq + k*slot; strides in floats.
struct state_dest {
    float * data;
    int64_t seq, slot;

    __device__ float * at(int64_t s, int64_t k) const { return data + s * seq + k * slot; }
};

// The states of an operator: read from rows of a cache, written to its result or, if the copy after the operator is
// elided, to the cache.
struct states {
    const float *   cache;
    int64_t         row_stride;  // floats
    const int32_t * rows;        // [n_seqs] the row that each sequence continues
    int32_t         zero_row;    // sequences that continue this row start from zero; -1: none
    int             n_seqs;
    int             n_slots;  // number of snapshots
    state_dest      result;
    state_dest      in_cache;   // data == nullptr: no copy is elided
    int             first_row;  // the row of the cache at which in_cache begins
    int             slot_rows;  // rows of the cache between its slots
};

// Form of the log-gate: without or with a lower bound.
struct gate_kind {
    bool  bounded;
    float lower_bound;
};

// Copies the states from an operator's result to the cache if rows conflict (kda-device.cuh); `size` floats per state.
// For kernels that cannot do it at their end. One launch for operators of more than one sequence whose copy was elided;
// no launch otherwise.
void copy_states(const states & st, int64_t size, int n_slots, cudaStream_t stream);

// out [n, size] = the rows of the cache [.., size] given by `rows` [n].
void gather_states(
    const float * cache, const int32_t * rows, int64_t n, int64_t size, float * out, cudaStream_t stream);

}  // namespace kda_cuda
