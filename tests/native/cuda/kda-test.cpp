// The CUDA kernels of KDA_CONV and KDA_SCAN on the CPU, against their float64 oracles: every kernel, head sizes,
// lengths around the tiles, several sequences with permuted and new rows, snapshots, states written into the cache or
// copied there, hostile gates; and bit-identical results for every thread order.
//
// Argument: the group of cases: conv, steps, chunks, scan or briefly; none: all.

#include "check.h"
#include "kda-cases.h"
#include "kda-conv.cuh"
#include "kda-scan.cuh"

#include <functional>

using namespace kda_cases;
using cuda_emulator::DeviceArray;
namespace kda = kda_cuda;

static constexpr double LIMIT = 1e-7;

// A contiguous tensor [a, heads, tokens, sequences]; other layouts are in kda-device-test.cpp.
struct source {
    int                a, H, T;
    DeviceArray<float> data;

    source(const std::vector<float> & x, int64_t a, int64_t H, int64_t T) : a(a), H(H), T(T), data(x) {}

    kda::rows rows(int64_t head = 0) const { return { data.data() + head * a, a, a * H, (int64_t) a * H * T }; }
};

struct options {
    bool in_place = false;  // a copy of the states to the cache is elided
    bool own_rows = false;  // every sequence continues the row that it writes
};

struct result {
    std::vector<float> out;
    std::vector<float> states;  // of the slots that have to be written
    bool               tail_untouched = true;
};

static constexpr float UNWRITTEN = 12345.0f;

// Memory of an operator's result and cache, laid out as by the glue.
struct memory {
    DeviceArray<float>   out, states, cache;
    DeviceArray<int32_t> rows;
    int64_t              size, S, n_slots;
    kda::states          st;

    // size: of a state. x: the inputs, of which this contains cache and rows.
    template <typename Shape, typename Inputs>
    memory(int64_t n_out, int64_t size, const Shape & n, const Inputs & x, const options & o) :
        out(n_out), states(std::vector<float>(size * n.S * n.K, UNWRITTEN)), cache(x.cache), rows(x.rows), size(size),
        S(n.S), n_slots(std::min(n.T + 1, n.K)) {
        const int64_t cells = cache.size() / size / n_slots;
        st                  = {};
        st.cache            = cache.data();
        st.row_stride       = size;
        st.rows             = rows.data();
        st.zero_row         = x.zero_row;
        st.n_seqs           = S;
        st.n_slots          = n.K;
        st.result           = { states.data(), size, size * S };
        if (o.in_place) {
            st.in_cache  = { cache.data(), size, size * cells };
            st.slot_rows = cells;
        }
    }

    template <typename Args, typename Shape> void hand_to(Args & args, const Shape & n, float eps) {
        args.out       = out.data();
        args.st        = st;
        args.head_size = n.D;
        args.n_heads   = n.H;
        args.n_tokens  = n.T;
        args.n_seqs    = n.S;
        args.eps       = eps;
    }

    result take(const options & o) const {
        result y;
        y.out = out.values();
        for (int64_t k = 0; k < n_slots; ++k) {
            for (int64_t s = 0; s < S; ++s) {
                const kda::state_dest & d    = o.in_place ? st.in_cache : st.result;
                const float *           from = d.data + s * d.seq + k * d.slot;
                y.states.insert(y.states.end(), from, from + size);
            }
        }
        const std::vector<float> all = states.values();
        y.tail_untouched =
            std::all_of(all.begin() + n_slots * S * size, all.end(), [](float x) { return x == UNWRITTEN; });
        return y;
    }
};

using scan_kernel = std::function<void(const kda::scan_args &)>;

static result run_scan(const scan_shape & n, const scan_inputs & x, const options & o, const scan_kernel & kernel) {
    const source qkv(x.qkv, n.D, 3 * n.H, n.T);
    const source f(x.f, n.D, n.H, n.T);
    const source gate(x.gate, n.D, n.H, n.T);
    const source beta(x.beta, n.H, 1, n.T);

    const DeviceArray<float> dt_bias(x.dt_bias), a(x.a), norm(x.norm);

    memory mem(n.D * n.H * n.T * n.S, n.D * n.D * n.H, n, x, o);

    kda::scan_args args = {};
    args.q              = qkv.rows();
    args.k              = qkv.rows(n.H);
    args.v              = qkv.rows(2 * n.H);
    args.f              = f.rows();
    args.gate           = gate.rows();
    args.beta           = beta.rows();
    args.beta.head      = 1;
    args.dt_bias        = dt_bias.data();
    args.a              = a.data();
    args.norm           = norm.data();
    mem.hand_to(args, n, x.eps);
    args.kind = { x.lower_bound > -INFINITY, (float) x.lower_bound };
    kernel(args);
    return mem.take(o);
}

static result run_conv(const conv_shape & n, const conv_inputs & x, const options & o) {
    const int64_t  C    = n.D * n.H;
    kda::conv_args args = {};
    const source   q(x.x[0], n.D, n.H, n.T);
    const source   k(x.x[1], n.D, n.H, n.T);
    const source   v(x.x[2], n.D, n.H, n.T);

    const DeviceArray<float> w[3] = { DeviceArray<float>(x.w[0]), DeviceArray<float>(x.w[1]),
                                      DeviceArray<float>(x.w[2]) };
    memory                   mem(3 * C * n.T * n.S, 9 * C, n, x, o);
    args.x[0] = q.rows();
    args.x[1] = k.rows();
    args.x[2] = v.rows();
    for (int p = 0; p < 3; ++p) {
        args.w[p] = w[p].data();
    }
    mem.hand_to(args, n, x.eps);
    kda::conv(args, nullptr);
    return mem.take(o);
}

static double worst;

// run: the kernels, once for each order. Slots of Want that are not written are ignored.
template <typename Shape, typename Want>
static void judge(const std::string & name, const Shape & n, const Want & want, const std::function<result()> & run) {
    const size_t n_states = want.states.size() / n.K * std::min(n.T + 1, n.K);
    result       first;
    double       e_out = 0, e_state = 0;
    bool         same = true, untouched = true;
    try {
        cuda_emulator::in_all_orders([&](const char *) {
            const result y = run();
            if (first.out.empty()) {
                first   = y;
                e_out   = nmse(y.out.data(), want.out.data(), want.out.size());
                e_state = nmse(y.states.data(), want.states.data(), n_states);
            }
            same      = same && same_bits(first.out, y.out) && same_bits(first.states, y.states);
            untouched = untouched && y.tail_untouched;
        });
    } catch (const cuda_emulator::Fault & fault) {
        expect(false, name + ": " + fault.what());
        return;
    }
    const bool ok = e_out <= LIMIT && e_state <= LIMIT && same && untouched;
    worst         = ok ? std::max({ worst, e_out, e_state }) : worst;
    expect(ok, name + text(": NMSE of the output %.2e, of the states %.2e, limit %.0e%s%s", e_out, e_state, LIMIT,
                           same ? "" : "; other bits in another order", untouched ? "" : "; slots beyond T written"));
}

template <typename Shape>
static std::string describe(const char * what, const Shape & n, bool new_seq, const options & o) {
    return text("%s D=%d H=%d T=%d S=%d K=%d new=%d in_place=%d own_rows=%d", what, (int) n.D, (int) n.H, (int) n.T,
                (int) n.S, (int) n.K, new_seq, o.in_place, o.own_rows);
}

static void test_conv(const conv_shape & n, bool new_seq, const options & o) {
    const conv_inputs x = make_conv(n, new_seq, o.own_rows);
    judge(describe("conv", n, new_seq, o), n, conv(n, x), [&] { return run_conv(n, x, o); });
}

// Bytes of shared memory per block of a GeForce and of a device for data centres. On both, two warps share 16 value
// channels where each has a scheduler of its own.
static constexpr size_t SCARCE = 99 << 10, ROOMY = 163 << 10;

// The whole operator on a device of this compute capability.
static scan_kernel whole(int capability, size_t block_shared = SCARCE) {
    return [=](const kda::scan_args & args) {
        // so small that with three sequences there are more blocks of `steps` than multiprocessors
        const kda::device_limits device     = { capability, args.head_size == 256 ? 8 : 4, block_shared };
        cuda_emulator::options.shared_limit = block_shared;
        const DeviceArray<char> work(kda::chunk_workspace(args, { 0, args.n_tokens }, device));
        kda::scan(args, device, work.data(), { nullptr, nullptr });
    };
}

// Chunks only, for any length. With one multiprocessor, a run is two chunks of a head and a block takes the whole head;
// with two, a run is four chunks and a block takes 32 channels. Three runs are needed to use half of the workspace again.
static scan_kernel chunks(int n_sms, size_t block_shared = SCARCE) {
    return [=](const kda::scan_args & args) {
        const kda::device_limits device     = { 80, n_sms, block_shared };
        cuda_emulator::options.shared_limit = block_shared;
        const kda::token_range  range       = { 0, args.n_tokens };
        const DeviceArray<char> work(kda::chunk_workspace(args, range, device));
        cuda_emulator::Stream   main, side;
        kda::scan_chunks(args, range, device, work.data(), { main.get(), side.get() });
        main.finish();
        kda::copy_states(args.st, (int64_t) args.head_size * args.head_size * args.n_heads, 1, nullptr);
    };
}

static void test_scan(const char *        what,
                      const scan_kernel & kernel,
                      const scan_shape &  n,
                      const char *        gate,
                      double              bound,
                      bool                new_seq,
                      const options &     o) {
    const scan_inputs x    = make_scan(n, gate, bound, new_seq, o.own_rows);
    const std::string name = describe(what, n, new_seq, o) + text(" gate=%s bound=%g", gate, bound);
    judge(name, n, scan(n, x), [&] { return run_scan(n, x, o, kernel); });
}

// A decay of 1 - 1.2e-4 at every one of 4096 tokens: an error in it accumulates over all of them.
static void test_long_memory(const char * what, const scan_kernel & kernel) {
    const scan_shape n = { 32, 1, 4096, 1, 1 };
    scan_inputs      x = make_scan(n, "ordinary", -INFINITY, false, false);
    std::fill(x.f.begin(), x.f.end(), -9.0f);
    std::fill(x.dt_bias.begin(), x.dt_bias.end(), 0.0f);
    std::fill(x.a.begin(), x.a.end(), -1.0f);
    judge(std::string(what) + " with a long memory", n, scan(n, x), [&] { return run_scan(n, x, {}, kernel); });
}

static options vary(int64_t i) {
    return { i % 4 < 2, i % 4 == 0 };
}

static void test_convs() {
    int64_t i = 0;
    for (const int64_t D : { 32, 64, 96, 128, 256 }) {
        for (const int64_t T : { 1, 2, 3, 15, 16, 17, 33, 65 }) {
            test_conv({ D, 3, T, i % 5 < 2 ? 1 : 3, i % 2 ? 4 : 1 }, i % 3 == 0, vary(i));
            ++i;
        }
    }
}

static void test_steps() {
    int64_t i = 0;
    for (const int64_t D : { 32, 64, 96, 128, 256 }) {
        for (const int64_t T : { 1, 2, 7, 8, 9, 16, 17, 65 }) {
            const int64_t K = i % 2 ? 4 : 1;
            test_scan("steps", whole(75), { D, 2, T, 1 + i % 3, K }, "ordinary", -INFINITY, i % 3 == 0, vary(i));
            ++i;
        }
    }
    for (const char * gate : gates) {
        for (const double bound : { -(double) INFINITY, -5.0 }) {
            test_scan("steps", whole(75), { 64, 1, 20, 2, 2 }, gate, bound, true, vary(i++));
        }
    }
    test_long_memory("steps", whole(75));
}

static void test_chunks() {
    int64_t i = 0;
    for (const int64_t D : { 32, 64, 96, 128 }) {
        for (const int64_t T : { 1, 2, 15, 16, 17, 63, 64, 65, 130 }) {
            test_scan("chunks", chunks(2), { D, 1, T, 1 + i % 2, 1 }, "ordinary", -INFINITY, i % 3 == 0, vary(i));
            ++i;
        }
        test_scan("chunks", chunks(1), { D, 1, 400, 1, 1 }, "ordinary", -INFINITY, false, vary(i++));
        test_scan("chunks", chunks(2, ROOMY), { D, 1, 600, 1, 1 }, "ordinary", -INFINITY, false, vary(i++));
    }
    for (const int64_t T : { 1, 47, 64, 65, 600 }) {
        test_scan("chunks", chunks(4, T == 64 ? SCARCE : ROOMY), { 128, 1, T, 1, 1 }, "ordinary", -INFINITY, T == 65,
                  vary(i++));
    }
    // long runs, and one long run
    test_scan("chunks", chunks(2, ROOMY), { 64, 1, 2100, 1, 1 }, "ordinary", -INFINITY, false, vary(i++));
    test_scan("chunks", chunks(2, ROOMY), { 32, 1, 1025, 1, 1 }, "ordinary", -INFINITY, false, vary(i++));
    for (const char * gate : gates) {
        test_scan("chunks", chunks(1), { 128, 1, 130, 1, 1 }, gate, i % 4 < 2 ? -INFINITY : -5.0, i % 2 == 0, vary(i));
        test_scan("chunks", chunks(4, i % 4 < 2 ? SCARCE : ROOMY), { 64, 2, 90, 1, 1 }, gate, -INFINITY, false,
                  vary(i));
        ++i;
    }
    test_long_memory("chunks", chunks(2));
    test_long_memory("chunks", chunks(2, ROOMY));
}

static void test_whole() {
    int64_t i = 0;
    for (const int64_t D : { 32, 64, 96, 128, 256 }) {
        // chunks from 40 tokens before the last three on, or from 32 with much shared memory
        for (const int64_t T : { 42, 43, 66, 131 }) {
            test_scan("scan", whole(90), { D, 1, T, 1 + i % 2, 4 }, "ordinary", -INFINITY, i % 3 == 0, vary(i));
            ++i;
        }
        for (const int64_t T : { 34, 35 }) {
            test_scan("scan", whole(90, ROOMY), { D, 1, T, 1, 4 }, "ordinary", -INFINITY, false, vary(i++));
        }
    }
    test_scan("scan", whole(90), { 128, 2, 134, 3, 2 }, "deadly", -INFINITY, true, vary(0));
    test_scan("scan", whole(90, ROOMY), { 128, 1, 134, 1, 3 }, "ordinary", -INFINITY, true, vary(0));
    test_scan("scan", whole(90, ROOMY), { 64, 2, 134, 1, 5 }, "deadly", -INFINITY, false, vary(1));
    test_scan("scan", whole(90, ROOMY), { 64, 1, 134, 2, 2 }, "ordinary", -5, true, vary(4));   // conflicting rows
    test_scan("scan", whole(90), { 64, 48, 128, 2, 1 }, "ordinary", -INFINITY, true, vary(0));  // one block per head
}

// One case of every kernel, for a program that checks shared memory.
static void test_briefly() {
    const options copied = { true, false };
    test_conv({ 64, 1, 17, 2, 2 }, true, copied);
    test_scan("steps", whole(75), { 64, 1, 17, 2, 2 }, "ordinary", -INFINITY, true, copied);
    test_scan("steps", whole(75), { 256, 1, 9, 1, 1 }, "ordinary", -INFINITY, true, {});
    test_scan("chunks", chunks(1), { 32, 1, 330, 1, 1 }, "ordinary", -INFINITY, false, {});
    test_scan("chunks", chunks(2), { 128, 1, 130, 1, 1 }, "ordinary", -INFINITY, true, {});
    for (const size_t block_shared : { SCARCE, ROOMY }) {
        test_scan("chunks", chunks(4, block_shared), { 128, 1, 130, 1, 1 }, "ordinary", -INFINITY, true, {});
    }
}

int main(int argc, char ** argv) {
    const struct {
        const char * name;
        void (*run)();
    } groups[] = {
        { "conv", test_convs }, { "steps", test_steps },     { "chunks", test_chunks },
        { "scan", test_whole }, { "briefly", test_briefly },
    };

    for (const auto & group : groups) {
        if (argc < 2 || strcmp(argv[1], group.name) == 0) {
            group.run();
        }
    }
    printf("largest NMSE that passed %.1e\n", worst);
    return report();
}
