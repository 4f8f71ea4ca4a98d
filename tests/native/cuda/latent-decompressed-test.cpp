// The CUDA kernels of latent attention's decompressed form, run on the CPU, against float64, in the cases of the CPU's
// own test: every type of cache and several of weights, lengths around the borders of tiles, blocks and runs of keys,
// masks with holes, several streams, flat and peaked scores, great and tiny queries, growing and shrinking values, poisoned cells,
// rows at odd addresses; and the same bits whatever order lanes run in.

#include "latent-judge.h"
#include "latent-node.cuh"

using latent_cuda::decompressed;

struct Setup {
    LatentShape shape;
    size_t      scratch = latent_cuda::SCRATCH;
    size_t      before  = 0;  // bytes in front of the cache
    int64_t     n_rows  = 0;  // of the result, how many are compared, 1: its first; 0: all
};

static std::string name_of(const Setup & setup) {
    const LatentShape & s = setup.shape;
    char                text[256];
    snprintf(text, sizeof(text),
             "%s weights %s queries %d keys %d heads %d streams %d mask %s spread %g query %g %g..%g%s",
             ggml_type_name(s.cache), ggml_type_name(s.weights), (int) s.n_queries, (int) s.n_keys, (int) s.n_heads,
             (int) s.n_streams, s.mask.c_str(), s.spread, s.query, s.first, s.last, s.poison ? " poisoned" : "");
    return text;
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

static std::vector<float> run(const ggml_tensor * dst, const Setup & setup) {
    const DeviceArray<char>  q     = to_device(dst->src[0]);
    const DeviceArray<char>  cache = to_device(dst->src[1], setup.before);
    const DeviceArray<float> k_b(as_floats(dst->src[2])), v_b(as_floats(dst->src[3]));
    const DeviceArray<char>  mask = to_device(dst->src[4] ? dst->src[4] : dst->src[0]);
    DeviceArray<float>       out(ggml_nelements(dst));

    decompressed args;
    const char * why = latent_cuda::read_decompressed(dst, args);
    if (why) {
        throw std::runtime_error(std::string("refused: ") + why);
    }
    args.q       = (const float *) q.data();
    args.cache   = cache.data() + setup.before;
    args.mask    = args.mask ? (const uint16_t *) mask.data() : nullptr;
    args.k_b     = k_b.data();
    args.v_b     = v_b.data();
    args.out     = out.data();
    args.scratch = setup.scratch;
    DeviceArray<char> work(latent_cuda::workspace(args));
    latent_cuda::attend(args, work.data(), nullptr);
    cudaDeviceSynchronize();
    return out.values();
}

static void check(const Setup & setup) {
    judge(setup.shape, name_of(setup), setup.n_rows, [&](const ggml_tensor * dst) { return run(dst, setup); });
}

static void test_type(ggml_type type) {
    Setup base;
    base.shape.cache   = type;
    base.shape.expand  = true;
    base.shape.n_heads = 1;
    const auto with    = [&](int64_t n_queries, int64_t n_keys) {
        Setup s           = base;
        s.shape.n_queries = n_queries;
        s.shape.n_keys    = n_keys;
        return s;
    };
    const int64_t lengths[][2] = { { 1, 1 }, { 2, 31 }, { 1, 33 }, { 17, 64 }, { 5, 129 }, { 130, 130 } };
    for (const auto & [n_queries, n_keys] : lengths) {
        Setup s        = with(n_queries, n_keys);
        s.shape.poison = true;
        check(s);
    }
    const ggml_type weights[] = { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0 };
    int             i         = 0;
    for (const char * mask : { "none", "mixed", "blind" }) {
        Setup s           = with(9, 70);
        s.shape.n_heads   = 2;
        s.shape.n_streams = 2;
        s.shape.mask      = mask;
        s.shape.weights   = weights[i++];
        s.shape.poison    = true;
        check(s);
    }
    for (const float spread : { 0.0f, 5.0f, 40.0f }) {
        Setup s        = with(16, 200);
        s.shape.spread = spread;
        check(s);
    }
    Setup near        = with(16, 200);  // scores that are large and almost the same
    near.shape.spread = 40.0f;
    near.shape.first = near.shape.last = 1e-3f;
    near.shape.weights                 = weights[3];
    check(near);
    const float deviations[][2] = { { 1e-5f, 1e-5f }, { 1e-4f, 100.0f }, { 100.0f, 1e-4f } };
    for (const auto & [first, last] : deviations) {
        Setup s        = with(3, 200);
        s.shape.spread = 0.05f;
        s.shape.first  = first;
        s.shape.last   = last;
        check(s);
    }
    for (const float deviation : { 1e-6f, 1e6f }) {
        Setup s       = with(3, 70);
        s.shape.query = deviation;
        check(s);
    }
    Setup beside       = with(2, 2);  // a query that sees small values beside one that sees great ones
    beside.shape.first = 1e-3f;
    beside.shape.last  = 1e3f;
    beside.n_rows      = 1;
    check(beside);

    Setup runs           = with(3, 300);  // keys in three runs, one stream after the other
    runs.shape.n_streams = 2;
    runs.shape.n_heads   = 2;
    runs.shape.poison    = true;
    runs.scratch         = 1;
    check(runs);
    runs.shape.mask = "mixed";
    runs.scratch    = 2 * 2 * 300 * 2048;  // two streams side by side
    check(runs);
    Setup wide           = with(2, 600);  // two of three streams side by side, keys in two runs; then the third
    wide.shape.n_streams = 3;
    wide.scratch         = 2 * 512 * (type == GGML_TYPE_F32 ? 3072 : ggml_is_quantized(type) ? 1664 : 1920);
    check(wide);
    Setup apart           = with(2, 65);  // a cache at an odd address
    apart.shape.n_streams = 2;
    apart.before          = type == GGML_TYPE_F32 ? 4 : 2;
    check(apart);
}

static void refused(const ggml_tensor * dst, const char * because) {
    decompressed args;
    refused_because(latent_cuda::read_decompressed(dst, args), because);
}

// One thing is wrong with each of these nodes.
static void test_refusals() {
    LatentShape small;
    small.expand  = true;
    small.n_keys  = 64;
    small.n_heads = 2;
    LatentCase        attention(small);
    const ggml_tensor good = *attention.node();
    ggml_tensor       dst = good, k = *good.src[1], k_b = *good.src[2], v_b = *good.src[3];
    decompressed      args;
    n_done++;
    n_failed += latent_cuda::read_decompressed(&good, args) != nullptr;

    const char * sizes = "head sizes other than 128 + 64 and 128, or a latent other than 512";
    dst.src[3]         = &v_b;
    v_b.ne[1]          = 64;
    refused(&dst, sizes);
    dst.src[3] = good.src[3];
    dst.src[2] = &k_b;
    k_b.ne[0]  = 192;
    refused(&dst, sizes);
    k_b = *good.src[2];
    k_b.nb[2] += 2;
    refused(&dst, "weights that do not lie one behind the other");
    dst.src[2] = good.src[2];
    dst.src[1] = &k;
    k.type     = GGML_TYPE_Q5_1;
    refused(&dst, "a type of cache that the kernels do not read");
}

int main(int argc, char ** argv) {
    return run_tests(argc, argv, test_refusals, test_type);
}
