// The CUDA kernels of latent attention, run on the CPU, against float64, in the cases of the CPU's own test: every type
// of cache, lengths around the borders of tiles and pieces, masks with holes, several streams, numbers of heads that do
// not fill a block of rows, flat and peaked scores, great and tiny queries, growing and shrinking values, poisoned padding, rows at odd
// addresses, nodes that are refused; and the same bits whatever order lanes run in. The node's sources are what the kernels get, through the code that reads nodes for ggml-cuda.

#include "latent-judge.h"
#include "latent-node.cuh"

using latent_cuda::attention;

static std::string name_of(const LatentShape & s) {
    char text[256];
    snprintf(text, sizeof(text), "%s queries %d keys %d heads %d streams %d mask %s spread %g%s",
             ggml_type_name(s.cache), (int) s.n_queries, (int) s.n_keys, (int) s.n_heads, (int) s.n_streams,
             s.mask.c_str(), s.spread, s.poison ? " poisoned" : "");
    return text;
}

static std::vector<float> run(const ggml_tensor * dst, size_t before) {
    const DeviceArray<char> q     = to_device(dst->src[0]);
    const DeviceArray<char> cache = to_device(dst->src[1], before);
    const DeviceArray<char> mask  = to_device(dst->src[3] ? dst->src[3] : dst->src[0]);
    DeviceArray<float>      out(ggml_nelements(dst));

    attention    args;
    const char * why = latent_cuda::read_node(dst, args);
    if (why) {
        throw std::runtime_error(std::string("refused: ") + why);
    }
    args.q     = (const float *) q.data();
    args.cache = cache.data() + before;
    args.mask  = args.mask ? (const uint16_t *) mask.data() : nullptr;
    args.out   = out.data();
    DeviceArray<char> work(latent_cuda::workspace(args));
    latent_cuda::attend(args, work.data(), nullptr);
    cudaDeviceSynchronize();
    return out.values();
}

// n_rows: of the result, how many are compared, 1: its first; 0: all.
static void check(const LatentShape & s, size_t before = 0, int64_t n_rows = 0) {
    judge(s, name_of(s), n_rows, [&](const ggml_tensor * dst) { return run(dst, before); });
}

static void refused(const ggml_tensor * dst, const char * because) {
    attention args;
    refused_because(latent_cuda::read_node(dst, args), because);
}

// One thing is wrong with each of these nodes.
static void test_refusals() {
    LatentShape small;
    small.n_keys  = 64;
    small.n_heads = 2;
    LatentCase             attention(small);
    const ggml_tensor      good = *attention.node();
    ggml_tensor            dst, k = *good.src[1], v = *good.src[2], mask = *good.src[3];
    const auto             fresh = [&]() -> ggml_tensor & { return dst = good; };
    latent_cuda::attention args;
    n_done++;
    n_failed += latent_cuda::read_node(&good, args) != nullptr;

    const float one = 1.0f;
    memcpy(&fresh().op_params[1], &one, sizeof(one));
    refused(&dst, "ALiBi");
    memcpy(&fresh().op_params[2], &one, sizeof(one));
    refused(&dst, "soft-capped scores");
    fresh().src[4] = good.src[3];
    refused(&dst, "attention sinks");
    ggml_op_set_mark(&fresh(), GGML_OP_MARK_UPSTREAM);
    refused(&dst, "switched off");

    fresh().src[2] = &v;
    v.view_offs += 2;
    refused(&dst, "V that is not the beginning of K");
    v.view_offs -= 2;
    v.ne[0] = 256;
    refused(&dst, "head sizes other than 576 and 512");

    fresh().src[3] = &mask;
    mask.ne[2]     = 2;
    refused(&dst, "a mask for each head");

    v              = *good.src[2];
    fresh().src[1] = &k;
    dst.src[2]     = &v;
    k.type = v.type = GGML_TYPE_Q5_1;
    refused(&dst, "a type of cache that the kernels do not read");
    k.type = v.type = GGML_TYPE_Q8_0;
    refused(&dst, "rows of a quantised cache that lie apart");
    k.type = v.type = GGML_TYPE_F16;
    k.nb[1] = v.nb[1] = k.nb[1] + 2;
    refused(&dst, "rows of the cache that do not begin at multiples of 16 bytes");
}

static void test_type(ggml_type type) {
    LatentShape base;
    base.cache   = type;
    base.n_heads = 4;
    for (const int64_t n_keys : { 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 129 }) {
        LatentShape s = base;
        s.n_keys      = n_keys;
        s.n_queries   = n_keys % 2 ? 1 : 2;
        s.poison      = true;
        check(s);
    }
    for (const char * mask : { "none", "mixed", "blind" }) {
        for (const int64_t n_heads : { 1, 3, 32 }) {
            LatentShape s = base;
            s.n_keys      = 100;
            s.n_queries   = n_heads == 32 ? 2 : 9;
            s.n_heads     = n_heads;
            s.n_streams   = n_heads == 3 ? 2 : 1;
            s.mask        = mask;
            s.poison      = true;
            check(s);
        }
    }
    for (const float spread : { 0.0f, 5.0f, 40.0f }) {
        LatentShape s = base;
        s.n_keys      = 300;
        s.n_heads     = 16;
        s.spread      = spread;
        check(s);
    }
    const float deviations[][2] = { { 1e-5f, 1e-5f }, { 1e-4f, 100.0f }, { 100.0f, 1e-4f } };
    for (const auto & [first, last] : deviations) {
        LatentShape s = base;
        s.n_keys      = 300;
        s.spread      = 0.05f;
        s.first       = first;
        s.last        = last;
        check(s);
    }
    for (const float deviation : { 1e-6f, 1e6f }) {
        LatentShape s = base;
        s.n_keys      = 70;
        s.query       = deviation;
        check(s);
    }
    LatentShape beside = base;  // a query that sees small values beside one that sees great ones
    beside.n_keys      = 2;
    beside.n_queries   = 2;
    beside.first       = 1e-3f;
    beside.last        = 1e3f;
    check(beside, 0, 1);
    LatentShape kimi = base;
    kimi.n_heads     = 32;
    kimi.n_keys      = 513;
    check(kimi);
    LatentShape apart = base;  // streams whose caches begin at multiples of 4 bytes only, where the type allows it
    apart.n_keys      = 65;
    apart.n_streams   = 2;
    check(apart);
    if (ggml_is_quantized(type)) {
        check(apart, 4);
    }
    if (type == GGML_TYPE_Q4_0) {  // more tiles than the least that a piece has
        LatentShape far = base;
        far.n_heads     = 1;
        far.n_keys      = 8300;
        check(far);
    }
}

int main(int argc, char ** argv) {
    return run_tests(argc, argv, test_refusals, test_type);
}
