// KDA scan: selects the kernels for each range of tokens.

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "kda-scan-chunk.cuh"
#include "kda-scan.cuh"

namespace kda_cuda {

// A token takes 1040 issue slots of a multiprocessor's schedulers step by step (sm_90, heads of 128). The kernels for
// chunks take as long as 64 to 96 tokens, if two warps per scheduler issue in 40 to 25 % of the cycles.
constexpr int CHUNKS_FROM = 96;

// A long sequence is processed in runs of chunks, and `prepare` computes the next run while `states` processes this one.
// A run should fill the blocks of `prepare` that fit the device at once, a whole number of times. It is no longer than
// that, because `prepare` of the first run and `states` of the last one have nothing to run beside.
constexpr int PREPARE_BLOCKS = 2;         // per multiprocessor: its registers allow two
constexpr int MAX_WAVES      = 4;         // more waves gain less than a sixteenth of the blocks
constexpr int WORTH_A_WAVE   = 16;        // a further wave has to use a sixteenth of the blocks more
constexpr int RUN_BYTES      = 48 << 20;  // limit of a run's intermediate data, half of the workspace

// Bytes per chunk of all heads and sequences.
static int64_t step_size(const scan_args & args) {
    int64_t size = 0;
    with_head_size(head_sizes(), args.head_size, [&](auto D) { size = chunk_layout<D>::SIZE; });
    return size * args.n_heads * args.n_seqs;
}

static int chunks_of_run(const scan_args & args, const token_range & range, const device_limits & device) {
    const int     n_chunks = (range.end - range.begin + CHUNK - 1) / CHUNK;
    const int64_t blocks   = (int64_t) args.n_heads * args.n_seqs;  // per chunk
    const int64_t places   = (int64_t) PREPARE_BLOCKS * device.n_sms;
    int64_t       chosen   = 1;
    double        used     = 0;  // share of the places
    for (int waves = 1; waves <= MAX_WAVES; ++waves) {
        const int64_t n     = waves * places / blocks;
        const double  share = (double) (n * blocks) / (waves * places);
        if (n > 0 && n * step_size(args) <= RUN_BYTES && share > used + 1.0 / WORTH_A_WAVE) {
            chosen = n;
            used   = share;
        }
    }
    return chosen < n_chunks ? chosen : n_chunks;
}

// The runs alternate between the halves of the workspace.
size_t chunk_workspace(const scan_args & args, const token_range & range, const device_limits & device) {
    const int  n      = chunks_of_run(args, range, device);
    const bool halves = range.begin + n * CHUNK < range.end;
    return (halves ? 2 : 1) * n * step_size(args);
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
    const int    n_tokens = chunks_of_run(args, range, device) * CHUNK;
    const size_t half     = n_tokens / CHUNK * step_size(args);
    const auto   run_at   = [&](int begin) {
        const int number = (begin - range.begin) / n_tokens;
        return chunk_run{ begin, begin + n_tokens < range.end ? begin + n_tokens : range.end,
                          static_cast<char *>(workspace) + number % 2 * half };
    };
    event half_is_free, is_prepared;
    prepare_chunks(args, run_at(range.begin), streams.main);
    for (int begin = range.begin; begin < range.end; begin += n_tokens) {
        const chunk_run run = run_at(begin);
        half_is_free.record(streams.main);  // the states of the previous run are computed
        carry_states(args, run, device, streams.main);
        if (run.end < range.end) {
            half_is_free.hold(streams.side);
            prepare_chunks(args, run_at(run.end), streams.side);
            is_prepared.record(streams.side);
        }
        scan_finish(args, { run.begin, run.end }, streams.main);  // while the output is in cache
        if (run.end < range.end) {
            is_prepared.hold(streams.main);
        }
    }
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

void scan(const scan_args & args, const device_limits & device, void * workspace, const scan_streams & streams) {
    const bool refused = chunks_refused(args.head_size, device.capability) != nullptr;
    const int  n       = refused ? 0 : tokens_in_chunks(args.n_tokens, args.st.n_slots);
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
