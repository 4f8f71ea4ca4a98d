// KDA scan: selects the kernels for each range of tokens.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kda-scan-chunk.cuh"
#include "kda-scan.cuh"

namespace kda_cuda {

// The break-even point of chunks is about here; to be measured.
constexpr int CHUNKS_FROM = CHUNK;

// Long sequences are processed in runs, so that the data passed between the kernels stays in a large L2 cache.
constexpr size_t RUN_BYTES = 48 << 20;

// Bytes per chunk of all heads and sequences.
static size_t step_size(const scan_args & args) {
    size_t size = 0;
    with_head_size(head_sizes(), args.head_size, [&](auto D) { size = chunk_layout<D>::SIZE; });
    return size * args.n_heads * args.n_seqs;
}

static int chunks_of_run(const scan_args & args, const token_range & range) {
    const int n_chunks = (range.end - range.begin + CHUNK - 1) / CHUNK;
    const int n_fit    = RUN_BYTES / step_size(args);
    return n_fit < 1 ? 1 : (n_fit < n_chunks ? n_fit : n_chunks);
}

size_t chunk_workspace(const scan_args & args, const token_range & range) {
    return chunks_of_run(args, range) * step_size(args);
}

void scan_chunks(const scan_args & args, const token_range & range, void * workspace, cudaStream_t stream) {
    const int n_tokens = chunks_of_run(args, range) * CHUNK;
    for (int begin = range.begin; begin < range.end; begin += n_tokens) {
        const chunk_run run = { begin, begin + n_tokens < range.end ? begin + n_tokens : range.end,
                                static_cast<char *>(workspace) };
        prepare_chunks(args, run, stream);
        carry_states(args, run, stream);
    }
    scan_finish(args, range, stream);
}

const char * chunks_refused(int head_size, int capability) {
    if (capability < 80) {
        return "compute capability below 8.0 has no bf16 products on tensor cores";
    }
    return head_size > 128 ? "a state of more than 128 key channels does not fit a warp's registers" : nullptr;
}

int tokens_in_chunks(int n_tokens, int n_slots) {
    const int n = n_tokens - n_slots + 1;
    return n >= CHUNKS_FROM ? n : 0;
}

void scan(const scan_args & args, int capability, void * workspace, cudaStream_t stream) {
    const bool refused = chunks_refused(args.head_size, capability) != nullptr;
    const int  n       = refused ? 0 : tokens_in_chunks(args.n_tokens, args.st.n_slots);
    if (n > 0) {
        scan_chunks(args, { 0, n }, workspace, stream);
    }
    if (n < args.n_tokens) {
        scan_steps(args, { n, args.n_tokens }, stream);
    }
    const int n_slots = args.st.n_slots < args.n_tokens + 1 ? args.st.n_slots : args.n_tokens + 1;
    copy_states(args.st, (int64_t) args.head_size * args.head_size * args.n_heads, n_slots, stream);
}

}  // namespace kda_cuda

#endif
