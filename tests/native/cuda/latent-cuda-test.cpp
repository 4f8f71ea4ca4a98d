// The CUDA kernels of latent attention in both forms, run on the CPU, against float64, in the cases of the CPU's test:
// every type of cache and several of weights, lengths around the borders of tiles, splits, blocks and runs of keys,
// masks with holes, several streams, numbers of heads that do not fill a block of rows, flat and peaked scores, large
// and small queries, growing and shrinking values, poisoned padding, rows at odd addresses, nodes that are refused; and
// bit-identical results for every lane order. The sources of a node are converted by the same code as in ggml-cuda.
//
//   latent-cuda-test absorbed|decompressed [TYPE of the cache ...]     no type: plans, and the nodes that are refused

#include "check.h"
#include "latent-attend.cuh"
#include "latent-cases.h"
#include "latent-node.cuh"

using namespace cuda_emulator;
using latent_cuda::attention;
using latent_cuda::decompressed;

static double worst[GGML_TYPE_COUNT];

struct Setup : LatentSetup {
    size_t scratch           = latent_cuda::SCRATCH;
    int    n_multiprocessors = 128;
    bool   half_sums         = false;  // as on GeForce
};

// A tensor's bytes on the device, after `before` other bytes, to change their alignment.
static DeviceArray<char> to_device(const ggml_tensor * t, size_t before = 0) {
    std::vector<char> bytes(before + ggml_nbytes(t), '\xff');
    memcpy(bytes.data() + before, t->data, ggml_nbytes(t));
    return DeviceArray<char>(bytes);
}

static std::vector<float> as_floats(const ggml_tensor * t) {
    std::vector<float> values(ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        memcpy(values.data(), t->data, ggml_nbytes(t));
    } else {
        ggml_get_type_traits(t->type)->to_float(t->data, values.data(), values.size());
    }
    return values;
}

static void require_taken(const char * why) {
    if (why) {
        throw std::runtime_error(std::string("refused: ") + why);
    }
}

template <class Args>
static std::vector<float> attend(const ggml_tensor * dst, const ggml_tensor * mask, size_t before, Args & args) {
    const DeviceArray<char> q      = to_device(dst->src[0]);
    const DeviceArray<char> cache  = to_device(dst->src[1], before);
    const DeviceArray<char> masked = to_device(mask ? mask : dst->src[0]);
    DeviceArray<float>      out(ggml_nelements(dst));

    args.q     = (const float *) q.data();
    args.cache = cache.data() + before;
    args.mask  = args.mask ? (const uint16_t *) masked.data() : nullptr;
    args.out   = out.data();
    DeviceArray<char> work(latent_cuda::workspace(args));
    latent_cuda::attend(args, work.data(), nullptr);
    cudaDeviceSynchronize();
    return out.values();
}

// The result of a node computed by the kernels.
static std::vector<float> run(const ggml_tensor * dst, const Setup & setup) {
    if (!setup.shape.expand) {
        attention args;
        require_taken(latent_cuda::read_node(dst, args));
        args.n_multiprocessors = setup.n_multiprocessors;
        args.half_sums         = setup.half_sums;
        return attend(dst, dst->src[3], setup.before, args);
    }
    const DeviceArray<float> k_b(as_floats(dst->src[2])), v_b(as_floats(dst->src[3]));
    decompressed             args;
    require_taken(latent_cuda::read_decompressed(dst, args));
    args.k_b     = k_b.data();
    args.v_b     = v_b.data();
    args.scratch = setup.scratch;
    args.exact   = setup.shape.exact;
    return attend(dst, dst->src[4], setup.before, args);
}

// Returns the NMSE, 0 if the case is not chosen.
static double check(const Setup & setup) {
    if (!chosen()) {
        return 0.0;
    }
    const LatentShape & s    = setup.shape;
    const std::string   name = name_of(s);
    LatentCase          attention(s);
    ggml_tensor *       dst = attention.node();
    std::vector<float>  first;
    try {
        in_all_orders([&](const char * order) {
            const std::vector<float> got = run(dst, setup);
            if (first.empty()) {
                first = got;
            }
            expect(memcmp(first.data(), got.data(), got.size() * sizeof(float)) == 0,
                   name + ": other bits, lanes " + order);
        });
    } catch (const std::exception & error) {
        expect(false, name + ": " + error.what());
        return 0.0;
    }
    memcpy(dst->data, first.data(), ggml_nbytes(dst));
    const int64_t n_rows = setup.n_rows == 0 ? s.n_rows() : setup.n_rows;
    const double  error  = attention.nmse(n_rows);
    worst[s.cache]       = std::max(worst[s.cache], error);
    expect(error <= limit_on_cuda(s), name + text(": NMSE against float64 %.1e", error));  // false for NaN too
    return error;
}

// Cases that only CUDA's kernels have: scores that share a large part, which shows every rounding of a key; weights and
// values that are small halves; and scores from which the exponent of the largest weight cannot be subtracted exactly.
static std::vector<LatentSetup> cuda_cases(ggml_type type) {
    std::vector<LatentSetup> cases = absorbed_cases(type);
    LatentShape              base;
    base.cache   = type;
    base.n_heads = 5;
    for (const float shift : { 20.0f, 100.0f, -300.0f }) {
        LatentShape s = base.with(3, 130);
        s.shift       = shift;
        cases.push_back({ s });
    }
    for (const float sink : { 16.6f, 18.0f }) {  // the others have weights of 2^-24 and 2^-26
        LatentShape s = base.with(1, 200);
        s.sink        = sink;
        s.spread      = 0.1f;
        cases.push_back({ s });
    }
    LatentShape varied = base.with(2, 2);  // a query that sees small values next to one that sees large ones
    varied.first       = 3e-4f;
    varied.last        = 3e3f;
    cases.push_back({ varied, 0, 1 });
    for (const float shift : { 3.5e7f, 7e7f, 1.4e8f, 1e9f }) {
        LatentShape same = base.with(1, 40);
        same.shift       = shift;
        same.alike       = true;
        cases.push_back({ same });
    }
    return cases;
}

static void test_absorbed(ggml_type type) {
    for (const LatentSetup & each : cuda_cases(type)) {
        check({ each });
    }
    if (type == GGML_TYPE_Q4_0) {  // more tiles than the minimum of a split
        LatentShape far = LatentShape().with(1, 8300);
        far.cache       = type;
        far.n_heads     = 1;
        check({ { far } });
        Setup many             = { { far.with(1, 17000) } };  // more splits than warps of the kernel that joins them
        many.n_multiprocessors = 300;
        check(many);
        Setup few           = { { far.with(40, 700) } };  // two blocks of rows and two streams on five multiprocessors
        few.shape.n_streams = 2;
        few.n_multiprocessors = 5;
        check(few);
        few.n_multiprocessors = 9;
        check(few);
    }
}

// The host reserves shared memory for MOST_LENT words of q.
using wide_form = latent_cuda::form<latent_cuda::cache_type::q8_0, latent_cuda::WIDE>;
static_assert(wide_form::LENT_WORDS <= wide_form::MOST_LENT && wide_form::LENT_WORDS % 2 == 0);

// Wide blocks: the same cases with more rows, some of them with a second block of rows that is not full.
static void test_wide(ggml_type type, bool half_sums) {
    for (const LatentSetup & each : cuda_cases(type)) {
        Setup setup     = { each };
        setup.half_sums = half_sums;
        if (each.shape.n_queries * each.shape.n_heads <= latent_cuda::NARROW) {
            setup.shape.n_heads = 33;
        }
        check(setup);
    }
    Setup few           = { { LatentShape().with(3, 200) } };  // splits of two streams and of two blocks of rows
    few.shape.cache     = type;
    few.shape.n_streams = 2;
    few.shape.mask      = "mixed";
    few.shape.poison    = true;
    few.half_sums       = half_sums;
    for (const int n_multiprocessors : { 5, 9, 13 }) {
        few.n_multiprocessors = n_multiprocessors;
        check(few);
    }
    // sums of halves show where all weights are alike
    Setup uniform        = { { LatentShape().with(2, 500) } };
    uniform.shape.cache  = type;
    uniform.shape.spread = 0.0f;
    uniform.half_sums    = half_sums;
    const double error   = check(uniform);
    expect(error == 0.0 || (error > 1e-10) == half_sums, text("half sums %d: NMSE %.1e", half_sums, error));
    // the largest sums of halves: all weights are alike, all quants the largest, their scale just below a power of two
    Setup largest       = { { LatentShape().with(2, 64) } };
    largest.shape.cache = type;
    largest.shape.mask  = "none";
    largest.shape.alike = true;
    largest.shape.first = largest.shape.last = type == GGML_TYPE_Q8_0 ? 127 * 1.999f : -8 * 1.999f;
    largest.half_sums                        = half_sums;
    check(largest);
}

// The splits cover the keys, in at most six waves of blocks and 96 MiB.
static void test_plans() {
    for (const int n_multiprocessors : { 1, 8, 46, 82, 108, 132, 170, 600 }) {
        for (const int n_rows : { 1, 32, 33, 128, 2048, 4096 }) {
            for (const int n_streams : { 1, 2, 7, 9, 14, 64 }) {
                for (const int n_keys : { 1, 64, 65, 4096, 65536, 524288 }) {
                    for (const bool wide : { false, true }) {
                        attention args            = {};
                        args.type                 = wide ? latent_cuda::cache_type::q8_0 : latent_cuda::cache_type::f16;
                        args.n_queries            = n_rows;
                        args.n_heads              = 1;
                        args.n_keys               = n_keys;
                        args.n_streams            = n_streams;
                        args.n_multiprocessors    = n_multiprocessors;
                        const latent_cuda::plan p = latent_cuda::make_plan(args);
                        const int               rows = wide && n_rows > 32 ? 64 : 32;
                        const std::string what = text("%d rows, %d keys, %d streams on %d: %d splits of %d", n_rows,
                                                      n_keys, n_streams, n_multiprocessors, p.n_pieces, p.keys_a_piece);
                        expect(p.block_rows == rows && p.n_blocks == (n_rows + rows - 1) / rows, what + ": blocks");
                        expect((p.n_pieces - 1) * p.keys_a_piece < n_keys && p.n_pieces * p.keys_a_piece >= n_keys,
                               what);
                        expect(p.keys_a_piece % 32 == 0 && p.keys_a_piece >= 64 && p.n_pieces <= 512, what);
                        const int64_t blocks = (int64_t) p.n_blocks * p.n_pieces * n_streams;
                        expect(blocks <= n_multiprocessors || latent_cuda::workspace(args) <= 96 << 20,
                               what + ": too much memory");
                        expect(p.n_pieces == 1 || blocks <= 6 * n_multiprocessors, what + ": too many waves");
                    }
                }
            }
        }
    }
}

static void test_decompressed(ggml_type type, bool exact) {
    LatentShape base;
    base.exact                 = exact;
    base.cache                 = type;
    base.expand                = true;
    base.n_heads               = 1;
    const int64_t lengths[][2] = { { 1, 1 }, { 2, 31 }, { 1, 33 }, { 17, 64 }, { 5, 129 }, { 130, 130 } };
    for (const auto & [n_queries, n_keys] : lengths) {
        LatentShape s = base.with(n_queries, n_keys);
        s.poison      = true;
        check({ { s } });
    }
    const std::pair<const char *, ggml_type> masks[] = { { "none", GGML_TYPE_F32 },
                                                         { "mixed", GGML_TYPE_BF16 },
                                                         { "blind", GGML_TYPE_Q8_0 } };
    for (const auto & [mask, weights] : masks) {
        LatentShape s = base.with(9, 70);
        s.n_heads     = 2;
        s.n_streams   = 2;
        s.mask        = mask;
        s.weights     = weights;
        s.poison      = true;
        check({ { s } });
    }
    LatentShape near = base.with(16, 200);  // scores that are large and almost equal
    near.spread      = 40.0f;
    near.first = near.last = 1e-3f;
    near.weights           = GGML_TYPE_Q5_0;
    check({ { near } });
    std::vector<LatentSetup> values;
    add_value_cases(values, base.with(16, 200), base.with(3, 200), base.with(3, 70));
    for (const LatentSetup & each : values) {
        check({ each });
    }

    Setup runs{ { base.with(3, 300) }, 1 };  // keys in three runs, one stream at a time
    runs.shape.n_streams = 2;
    runs.shape.n_heads   = 2;
    runs.shape.poison    = true;
    check(runs);
    runs.shape.mask = "mixed";
    runs.scratch    = 2 * 2 * 300 * 2048;  // two streams together
    check(runs);
    LatentShape wide = base.with(2, 600);  // two of three streams together, keys in two runs; then the third
    wide.n_streams   = 3;
    check({ { wide }, 2 * 512 * (type == GGML_TYPE_F32 ? 3072u : exact ? 1920u : 1664u) });
    LatentShape apart = base.with(2, 65);  // a cache at an odd address
    apart.n_streams   = 2;
    check({ { apart, type == GGML_TYPE_F32 ? 4u : 2u } });
}

// why: the result of reading a node, nullptr if it was accepted.
static void refused_because(const char * why, const char * because) {
    expect(why != nullptr && strcmp(why, because) == 0, text("a node with %s: %s", because, why ? why : "not refused"));
}

// Each of these nodes has one defect.
static void test_absorbed_refusals() {
    LatentShape small = LatentShape().with(1, 64);
    small.n_heads     = 2;
    LatentCase        attention(small);
    const ggml_tensor good = *attention.node();
    ggml_tensor       dst, k = *good.src[1], v = *good.src[2], mask = *good.src[3];
    const auto        fresh   = [&]() -> ggml_tensor & { return dst = good; };
    const auto        refused = [&](const char * because) {
        latent_cuda::attention args;
        refused_because(latent_cuda::read_node(&dst, args), because);
    };
    latent_cuda::attention args;
    expect(latent_cuda::read_node(&good, args) == nullptr, "a good node");

    const float one = 1.0f;
    memcpy(&fresh().op_params[1], &one, sizeof(one));
    refused("ALiBi");
    memcpy(&fresh().op_params[2], &one, sizeof(one));
    refused("soft-capped scores");
    fresh().src[4] = good.src[3];
    refused("attention sinks");
    ggml_op_set_mark(&fresh(), GGML_OP_MARK_UPSTREAM);
    refused("switched off");

    fresh().src[2] = &v;
    v.view_offs += 2;
    refused("V that is not the beginning of K");
    v.view_offs -= 2;
    v.ne[0] = 256;
    refused("head sizes other than 576 and 512");

    fresh().src[3] = &mask;
    mask.ne[2]     = 2;
    refused("a mask for each head");

    fresh().op_params[4] = 2048;
    refused("sparse");

    v              = *good.src[2];
    fresh().src[1] = &k;
    dst.src[2]     = &v;
    k.type = v.type = GGML_TYPE_Q5_1;
    refused("a type of cache that the kernels do not read");
    k.type = v.type = GGML_TYPE_Q8_0;
    refused("rows of a quantised cache that lie apart");
    k.type = v.type = GGML_TYPE_F16;
    k.nb[1] = v.nb[1] = k.nb[1] + 2;
    refused("rows of the cache that do not begin at multiples of 16 bytes");
}

static void test_decompressed_refusals() {
    LatentShape small = LatentShape().with(1, 64);
    small.expand      = true;
    small.n_heads     = 2;
    LatentCase        attention(small);
    const ggml_tensor good = *attention.node();
    ggml_tensor       dst = good, k = *good.src[1], k_b = *good.src[2], v_b = *good.src[3];
    const auto        refused = [&](const char * because) {
        decompressed args;
        refused_because(latent_cuda::read_decompressed(&dst, args), because);
    };
    decompressed args;
    expect(latent_cuda::read_decompressed(&good, args) == nullptr, "a good node");

    for (const int64_t n_keys : { 255, 256 }) {
        LatentCase of_length(small.with(1, n_keys));
        expect(latent_cuda::read_decompressed(of_length.node(), args) == nullptr && args.exact == (n_keys < 256),
               text("%d keys: exact or not", (int) n_keys));
    }

    const char * sizes = "head sizes other than 128 + 64 and 128, or a latent other than 512";
    dst.src[3]         = &v_b;
    v_b.ne[1]          = 64;
    refused(sizes);
    dst.src[3] = good.src[3];
    dst.src[2] = &k_b;
    k_b.ne[0]  = 192;
    refused(sizes);
    k_b = *good.src[2];
    k_b.nb[2] += 2;
    refused("weights that are not contiguous");
    dst.src[2] = good.src[2];
    dst.src[1] = &k;
    k.type     = GGML_TYPE_Q5_1;
    refused("a type of cache that the kernels do not read");
}

int main(int argc, char ** argv) {
    const bool expand = argc > 1 && strcmp(argv[1], "decompressed") == 0;
    if (argc == 2) {
        expand ? test_decompressed_refusals() : test_absorbed_refusals();
        expand ? (void) 0 : test_plans();
    }
    for (int i = 2; i < argc; ++i) {
        const ggml_type type = type_of(argv[i]);
        for (const bool exact : { true, false }) {
            if (exact && !(expand && (type == GGML_TYPE_F16 || type == GGML_TYPE_BF16))) {
                continue;
            }
            worst[type] = 0.0;
            expand ? test_decompressed(type, exact) : test_absorbed(type);
            printf("%s%s: largest NMSE %.1e\n", argv[i], exact ? " exact" : "", worst[type]);
            for (const bool half_sums : { false, true }) {
                if (!expand && ggml_is_quantized(type)) {
                    worst[type] = 0.0;
                    test_wide(type, half_sums);
                    printf("%s, wide, sums of %s: largest NMSE %.1e\n", argv[i], half_sums ? "halves" : "floats",
                           worst[type]);
                }
            }
        }
    }
    return report();
}
