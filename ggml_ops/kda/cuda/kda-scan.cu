// KDA scan: selects the kernels for each range of tokens.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kda-scan-chunk.cuh"
#include "kda-scan.cuh"

namespace kda_cuda {

// Measured on an H200: 32 heads of 128 take 5 us for one token step by step and 1 us for each further one; in chunks, 32 to
// 64 tokens take 33 us. CHUNKS_FROM_SMALL is for devices on which a block cannot have 160 KiB of shared memory. It is
// computed by a cycle model, not measured (commit d90d8139): chunks are faster from 32 to 54 tokens on, and 40 loses least.
constexpr int CHUNKS_FROM       = 32;
constexpr int CHUNKS_FROM_SMALL = 40;

// A long sequence is processed in runs of chunks, and `prepare` computes the next run while `states` processes this one.
// A run should fill the blocks of `prepare` that fit the device at once, a whole number of times. It is no longer than
// that, because `prepare` of the first run and `states` of the last one have nothing to run beside. In long sequences
// these two are a small share, so the runs between them are twice as long. (H200: 2048 tokens 277 us instead of 292, 8192
// tokens 1.05 ms instead of 1.08 at that time.)
constexpr int PREPARE_BLOCKS = 2;         // per multiprocessor: its registers allow two
constexpr int MAX_WAVES      = 4;         // more waves gain less than a sixteenth of the blocks
constexpr int WORTH_A_WAVE   = 16;        // a further wave has to use a sixteenth of the blocks more
constexpr int RUN_BYTES      = 48 << 20;  // of the first and the last run, unless they are one chunk
constexpr int LONG_RUNS_FROM = 4;         // runs

// Bytes per chunk of all heads and sequences.
static int64_t step_size(const scan_args & args) {
    int64_t size = 0;
    with_head_size(head_sizes(), args.head_size, [&](auto D) { size = chunk_layout<D>::SIZE; });
    return size * args.n_heads * args.n_seqs;
}

namespace {

// The runs of a range of tokens, in chunks.
struct run_lengths {
    int n_chunks;
    int edge;   // the first and the last run; the last may be shorter
    int inner;  // the longest of those between

    run_lengths(const scan_args & args, const token_range & range, const device_limits & device) :
        n_chunks((range.end - range.begin + CHUNK - 1) / CHUNK), edge(1) {
        const int64_t blocks = (int64_t) args.n_heads * args.n_seqs;  // per chunk
        const int64_t places = (int64_t) PREPARE_BLOCKS * device.n_sms;
        double        used   = 0;  // share of the places
        for (int waves = 1; waves <= MAX_WAVES; ++waves) {
            const int64_t n     = waves * places / blocks;
            const double  share = (double) (n * blocks) / (waves * places);
            if (n > 0 && n * step_size(args) <= RUN_BYTES && share > used + 1.0 / WORTH_A_WAVE) {
                edge = n;
                used = share;
            }
        }
        inner = device.block_shared >= ROOMY && n_chunks >= LONG_RUNS_FROM * edge ? 2 * edge : edge;
    }

    int longest() const { return n_chunks < inner ? n_chunks : inner; }

    // The end of the run that begins at a chunk.
    int end(int begin) const {
        const int left = n_chunks - begin;
        int       n    = edge;
        if (begin > 0 && left > 2 * edge) {
            n = left - edge < inner ? left - edge : inner;
        }
        return begin + (n < left ? n : left);
    }
};

}  // namespace

// The runs alternate between the halves of the workspace.
size_t chunk_workspace(const scan_args & args, const token_range & range, const device_limits & device) {
    const run_lengths runs(args, range, device);
    return (runs.n_chunks > runs.longest() ? 2 : 1) * runs.longest() * step_size(args);
}

namespace {

// Lets a stream wait for another one. May be destroyed before the work is done, also while a graph is captured.
class event {
  public:
    event() { cudaEventCreateWithFlags(&of_cuda, cudaEventDisableTiming); }

    ~event() { cudaEventDestroy(of_cuda); }

    event(const event &)             = delete;
    event & operator=(const event &) = delete;

    void record(cudaStream_t stream) { cudaEventRecord(of_cuda, stream); }

    void hold(cudaStream_t stream) { cudaStreamWaitEvent(stream, of_cuda, 0); }

  private:
    cudaEvent_t of_cuda = nullptr;
};

}  // namespace

void scan_chunks(const scan_args &     args,
                 const token_range &   range,
                 const device_limits & device,
                 void *                workspace,
                 const scan_streams &  streams) {
    const run_lengths runs(args, range, device);
    const size_t      half   = runs.longest() * step_size(args);
    int               number = 0;
    const auto        run_at = [&](int begin) {  // begin: chunk; called once for each run
        const int end = range.begin + runs.end(begin) * CHUNK;
        return chunk_run{ range.begin + begin * CHUNK, end < range.end ? end : range.end,
                          static_cast<char *>(workspace) + number++ % 2 * half };
    };
    event     half_is_free, is_prepared;
    chunk_run run = run_at(0);
    prepare_chunks(args, run, device, streams.main);
    for (int end = runs.end(0);; end = runs.end(end)) {
        half_is_free.record(streams.main);  // the states of the previous run are computed
        carry_states(args, run, device, streams.main);
        if (end == runs.n_chunks) {
            break;
        }
        const chunk_run next = run_at(end);
        half_is_free.hold(streams.side);
        prepare_chunks(args, next, device, streams.side);
        is_prepared.record(streams.side);
        scan_finish(args, { run.begin, run.end }, streams.main);  // while the output is in cache
        is_prepared.hold(streams.main);
        run = next;
    }
    scan_finish(args, { run.begin, run.end }, streams.main);
}

const char * chunks_refused(int head_size, int capability) {
    if (capability < 80) {
        return "compute capability below 8.0 has no bf16 products on tensor cores";
    }
    return head_size > 128 ? "a state of more than 128 key channels does not fit a warp's registers" : nullptr;
}

int tokens_in_chunks(const scan_args & args, const device_limits & device) {
    const int n = args.n_tokens - args.st.n_slots + 1;
    return n >= (device.block_shared >= ROOMY ? CHUNKS_FROM : CHUNKS_FROM_SMALL) ? n : 0;
}

void scan(const scan_args & args, const device_limits & device, void * workspace, const scan_streams & streams) {
    const bool refused = chunks_refused(args.head_size, device.capability) != nullptr;
    const int  n       = refused ? 0 : tokens_in_chunks(args, device);
    if (n > 0) {
        scan_chunks(args, { 0, n }, device, workspace, streams);
    }
    if (n < args.n_tokens) {
        scan_steps(args, { n, args.n_tokens }, device, streams.main);
    } else {
        copy_states(args.st, (int64_t) args.head_size * args.head_size * args.n_heads, 1, streams.main);
    }
}

}  // namespace kda_cuda

#endif
