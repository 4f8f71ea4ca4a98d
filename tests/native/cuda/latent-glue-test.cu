// ggml's side of latent attention on CUDA: which nodes are supported on which device, absorbed and decompressed
// (latent-ggml.cu), that other nodes are not touched, and that the results are correct.

#include "../latent-attn-case.h"
#include "fattn-common.cuh"
#include "fattn.cuh"
#include "ggml-cuda-standin.cuh"
#include "latent-ggml.cuh"
#include "on-device.cuh"
#include "to-floats.cuh"

// As fattn.cu: the kernel for this shape of head reads the mask, and whole groups of 256 keys.
bool ggml_cuda_flash_attn_ext_supported(int, const ggml_tensor * dst) {
    return dst->src[3] != nullptr && dst->src[1]->ne[1] % FATTN_KQ_STRIDE == 0;
}

static constexpr float UNTOUCHED  = 12345.0f;
static double          last_error = 0.0;  // NMSE of the last absorbed node that was computed

// Whether the absorbed node of this shape is computed. Its result has to be correct then, and untouched otherwise.
static bool taken(const LatentShape & shape, int capability = 800, int n_kv_max = 0) {
    standin_capability = capability;
    LatentCase                attention(shape);
    ggml_backend_cuda_context cuda(0);
    ggml_tensor *             node = attention.node();
    node->op_params[4]             = n_kv_max;
    std::fill((float *) node->data, (float *) node->data + ggml_nelements(node), UNTOUCHED);
    const size_t size = ggml_cuda_latent_attention_size(0, node);
    OnDevice     device(node, size);
    const bool   yes = ggml_cuda_latent_attention(cuda, device.node());
    CHECK(yes == (size > 0));
    device.fetch();
    const float * got = (const float *) node->data;
    if (yes) {
        last_error = attention.nmse(shape.n_rows());
        CHECK(last_error <= limit_on_cuda(shape));
    } else {
        CHECK(std::count(got, got + ggml_nelements(node), UNTOUCHED) == ggml_nelements(node));
    }
    return yes;
}

// The node's memory by its sizes alone, 0 if upstream computes it: nothing is computed, and there is data for a few keys
// only.
static size_t size_of(LatentShape shape, int capability = 800) {
    standin_capability   = capability;
    const int64_t n_keys = shape.n_keys;
    shape.n_keys         = 70;
    LatentCase    attention(shape);
    ggml_tensor * node = attention.node();
    for (const int source : { 1, 2 }) {
        node->src[source]->ne[1] = n_keys;
    }
    node->src[3]->ne[0] = n_keys;
    return ggml_cuda_latent_attention_size(0, node);
}

static bool offered(const LatentShape & shape, int capability = 800) {
    return size_of(shape, capability) > 0;
}

// Whether the decompressed node of this shape is supported. Its result has to be correct then.
static bool claimed(const LatentShape & shape, int capability = 800) {
    standin_capability = capability;
    LatentCase attention(shape);
    if (!ggml_cuda_latent_attn_supported(0, attention.node())) {
        return false;
    }
    ggml_backend_cuda_context cuda(0);
    OnDevice                  device(attention.node(), ggml_cuda_latent_attn_size(attention.node()));
    ggml_cuda_op_latent_attn(cuda, device.node());
    device.fetch();
    CHECK(attention.nmse(shape.n_rows()) <= limit_on_cuda(shape));
    return true;
}

static LatentShape with_cache(LatentShape shape, ggml_type type) {
    shape.cache = type;
    return shape;
}

static LatentShape with_weights(LatentShape shape, ggml_type type) {
    shape.weights = type;
    return shape;
}

static LatentShape exact(LatentShape shape) {
    shape.exact = true;
    return shape;
}

static LatentShape with_heads(LatentShape shape, int64_t n_heads) {
    shape.n_heads = n_heads;
    return shape;
}

static void test_absorbed() {
    const LatentShape one = LatentShape().with(1, 70);
    // by default, where they are faster
    for (const ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        const LatentShape shape = with_cache(with_heads(one, 1), type);
        for (const int capability : { 800, 860, 890, 900, 1000, 1200 }) {
            const bool data_centre = capability == 800 || capability == 900 || capability == 1000;
            const int  from        = data_centre ? 4096 : 12289;
            CHECK(offered(shape.with(1, from), capability));
            CHECK(!offered(shape.with(1, from - 1), capability));
            CHECK(!offered(with_heads(shape.with(1, from), 33), capability));
            CHECK(!offered(shape.with(33, from), capability));
        }
        CHECK(taken(shape.with(1, 4096), 900));
        CHECK(!taken(shape.with(1, 4096), 1200));
    }
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        const LatentShape shape = with_cache(with_heads(one.with(1, 4096), 1), type);
        for (const int capability : { 800, 900, 1000, 1030 }) {  // data centre
            CHECK(offered(shape, capability));
        }
        for (const int capability : { 860, 870, 890, 1100, 1200 }) {
            CHECK(!offered(shape, capability));
        }
        CHECK(taken(shape));
        CHECK(!offered(shape.with(33, 4096)));
        CHECK(!offered(shape.with(1, 4095)));
    }
    const LatentShape f32 = with_cache(with_heads(one, 1), GGML_TYPE_F32);
    CHECK(!offered(f32.with(1, 65535)));
    CHECK(!offered(f32.with(1, 65536), 890));
    CHECK(offered(f32.with(1, 65536)));
    CHECK(!taken(with_cache(one, GGML_TYPE_F16)));

    // where upstream's copy in F16 would take more than 128 MiB: 2 * 576 bytes per key
    const auto long_one = [](ggml_type type, int64_t n_keys, int64_t n_streams) {
        LatentShape shape = with_heads(with_cache(LatentShape().with(40, n_keys), type), 2);
        shape.n_streams   = n_streams;
        return offered(shape, 1200);
    };
    for (const ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        CHECK(!long_one(type, 116508, 1) && long_one(type, 116509, 1));
        CHECK(!long_one(type, 58254, 2) && long_one(type, 58255, 2));
    }
    CHECK(!long_one(GGML_TYPE_BF16, 116509, 1) && !long_one(GGML_TYPE_F16, 116509, 1));

    // wherever they are more accurate
    LatentShape more = exact(with_heads(one.with(9, 70), 2));
    more.n_streams   = 2;
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        CHECK(taken(with_cache(more, type)));
    }
    CHECK(!taken(with_cache(more, GGML_TYPE_Q5_1)));
    CHECK(taken(more, 1200));
    // all sums in float32, also where others are halves: equal weights add exactly
    LatentShape equal = exact(with_cache(LatentShape().with(2, 500), GGML_TYPE_Q8_0));
    equal.spread      = 0.0f;
    CHECK(taken(equal, 1200) && last_error < 1e-12);

    // never
    CHECK(!taken(more, 750));
    CHECK(!taken(more, 800, 2048));  // sparse
    LatentShape off = more;
    off.plain       = true;
    CHECK(!taken(off));
    LatentShape small = more;
    small.n_latent    = 256;
    CHECK(!taken(small));
}

// Only GeForce sums 32 weighted values in halves; with equal weights, sums in float32 are exact. By default that many rows
// are taken with a long cache only, so each of these takes a minute.
static void test_sums(int capability) {
    LatentShape equal = with_heads(with_cache(LatentShape().with(17, 116509), GGML_TYPE_Q8_0), 2);
    equal.spread      = 0.0f;
    CHECK(taken(equal, capability));
    CHECK(capability == 1200 ? last_error > 1e-10 : last_error < 1e-12);
}

// llama.cpp reserves memory with the node that reads the whole cache. Where upstream's kernels compute the same node with
// fewer keys, they need its result and an F16 copy of those rows.
static void test_memory_of_fewer_keys() {
    constexpr size_t  ROW    = 2 * 576;
    const auto        result = [](const LatentShape & s) { return sizeof(float) * 512 * s.n_rows(); };
    const LatentShape one    = with_heads(LatentShape(), 1);
    const LatentShape many   = with_heads(one, 2).with(40, 0);
    for (const ggml_type type : { GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (const int capability : { 900, 1200 }) {
            LatentShape shape = with_cache(many, type);
            // ours needs less than the largest copy, also with a longer cache and in several streams
            CHECK(size_of(shape.with(40, 116509), capability) == result(shape) + 116508 * ROW);
            CHECK(size_of(shape.with(40, 1048576), capability) == result(shape) + 116508 * ROW);
            shape.n_streams = 3;
            CHECK(size_of(shape.with(40, 65536), capability) == result(shape) + 116508 * ROW);
            // one block of rows: upstream computes it only with a short cache
            const size_t from = capability == 900 ? 4096 : 12289;
            shape             = with_cache(one, type);
            CHECK(size_of(shape.with(1, from), capability) == result(shape) + (from - 1) * ROW);
            CHECK(size_of(shape.with(1, 1048576), capability) == result(shape) + (from - 1) * ROW);
            shape.n_streams = 2;
            CHECK(size_of(shape.with(1, 16384), capability) == result(shape) + 2 * (from - 1) * ROW);
            // always ours: no copy
            CHECK(size_of(exact(with_cache(many, type)).with(40, 116509), capability) < result(many) + 16 * 1024 * ROW);
        }
    }
    const LatentShape bf16 = with_cache(one, GGML_TYPE_BF16).with(1, 65536);
    CHECK(size_of(bf16) == result(bf16) + 4095 * ROW);
    CHECK(size_of(with_cache(bf16, GGML_TYPE_F32)) == result(bf16) + 65535 * ROW);
    CHECK(size_of(with_cache(bf16, GGML_TYPE_F16)) < result(bf16) + 1024 * ROW);
}

// A launch of upstream's kernel.
struct Noted {
    const char * q;
    const char * mask;
    int          n_queries;
    int          n_keys;

    std::vector<int> ends;  // of tiles of four queries: the end of the last 256 keys that they see
};

static std::vector<Noted> noted;

static __global__ void note(const char * q,
                            const char *,
                            const char *,
                            const char * mask,
                            const char *,
                            const int * ends,
                            float *,
                            float2 *,
                            const float,
                            const float,
                            const float,
                            const float,
                            const uint32_t,
                            const float,
                            const int32_t,
                            const uint3 n_queries,
                            const int32_t,
                            const int32_t,
                            const int32_t,
                            const int32_t,
                            const int32_t,
                            const int32_t,
                            const int32_t n_keys,
                            const int32_t,
                            const int32_t,
                            const int32_t,
                            const int32_t,
                            const int64_t,
                            const int32_t,
                            const int32_t,
                            const int64_t,
                            const int32_t,
                            const int32_t,
                            const int32_t,
                            const int32_t,
                            const int32_t,
                            const int64_t) {
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        const int n = n_queries.z;
        noted.push_back({ q, mask, n, n_keys, std::vector<int>(ends, ends + (n + 3) / 4) });
    }
}

static bool in_runs(ggml_tensor * node) {
    ggml_backend_cuda_context cuda(0);
    noted.clear();
    return ggml_cuda_latent_in_runs(cuda, node, note, dim3(32), 0, 32, 4, 16);
}

// Upstream's kernel gets each query with each key once, in runs of at most so many keys.
static void check_runs(const LatentShape & shape, int capability, int most_keys) {
    standin_capability = capability;
    LatentCase                attention(shape);
    ggml_backend_cuda_context cuda(0);
    OnDevice                  device(attention.node(), ggml_cuda_latent_attention_size(0, attention.node()));
    const ggml_tensor &       q    = *device.node()->src[0];
    const ggml_tensor &       mask = *device.node()->src[3];
    CHECK(!ggml_cuda_latent_attention(cuda, device.node()));
    CHECK(in_runs(device.node()) && noted.size() > 1);

    const int64_t    n_parts = shape.n_keys / 256;
    std::vector<int> times(shape.n_streams * shape.n_queries * n_parts);
    for (const Noted & each : noted) {
        CHECK(each.n_keys <= most_keys && each.n_keys % 256 == 0);
        const size_t at_q   = each.q - static_cast<const char *>(q.data);
        const size_t stream = at_q / q.nb[3], first = at_q % q.nb[3] / q.nb[1];
        const size_t at_key =
            each.mask - static_cast<const char *>(mask.data) - stream * mask.nb[3] - first * mask.nb[1];
        const int64_t first_key = at_key / sizeof(uint16_t);
        for (int query = 0; query < each.n_queries; ++query) {
            const int end = each.ends[query / 4];
            for (int key = end; key < each.n_keys; ++key) {
                CHECK(!shape.visible(stream, first + query, first_key + key));
            }
            bool seen = end == 0;
            for (int other = query / 4 * 4; other < std::min(query / 4 * 4 + 4, each.n_queries); ++other) {
                for (int key = end - 256; key < end; ++key) {
                    seen = seen || shape.visible(stream, first + other, first_key + key);
                }
            }
            CHECK(seen);
            for (int key = 0; key < each.n_keys; key += 256) {
                const size_t row = stream * shape.n_queries + first + query;
                ++times.at(row * n_parts + (first_key + key) / 256);
            }
        }
    }
    CHECK(std::count(times.begin(), times.end(), 1) == static_cast<int64_t>(times.size()));
}

// The same node as if it had so many keys.
static bool in_runs_with(const LatentShape & shape, int64_t n_keys) {
    LatentCase attention(shape);
    for (const int source : { 1, 2 }) {
        attention.node()->src[source]->ne[1] = n_keys;
    }
    attention.node()->src[3]->ne[0] = n_keys;
    return in_runs(attention.node());
}

// Many queries over a quantized cache that is too long to be copied as a whole.
static void test_runs() {
    const LatentShape many = with_cache(LatentShape().with(11, 116736), GGML_TYPE_Q8_0);
    check_runs(many, 900, 34816);
    check_runs(many, 1200, 58112);
    LatentShape slots = many.with(37, 116736);
    slots.mask        = "slots";
    check_runs(slots, 900, 34816);
    LatentShape streams = many.with(267, 58624);  // two groups of queries
    streams.n_streams   = 2;
    check_runs(streams, 900, 34816);

    // not: few rows, keys that are copied as a whole, other caches, more accurate kernels, blocks of fewer rows, short streams
    const LatentShape small = many.with(11, 512);
    CHECK(!in_runs_with(small.with(10, 512), 116736));
    CHECK(!in_runs_with(small, 116480));
    CHECK(!in_runs_with(with_cache(small, GGML_TYPE_BF16), 116736));
    CHECK(!in_runs_with(exact(small), 116736));
    CHECK(!in_runs_with(with_heads(small.with(2, 512), 192), 116736));
    CHECK(!in_runs_with(with_heads(small.with(8, 512), 44), 116736));
    LatentShape short_ones = small;
    short_ones.n_streams   = 4;
    CHECK(!in_runs_with(short_ones, 32512));

    // the memory is that of the largest copy of a cache that is copied as a whole
    for (const int capability : { 900, 1200 }) {
        for (const auto & [n_queries, n_heads] :
             { std::pair(11, 32), std::pair(191, 32), std::pair(191, 128), std::pair(300, 20), std::pair(2047, 32) }) {
            const LatentShape shape = with_heads(many, n_heads).with(n_queries, 1048576);
            CHECK(size_of(shape, capability) == sizeof(float) * 512 * shape.n_rows() + size_t(116508) * 2 * 576);
        }
    }
}

static void test_decompressed() {
    LatentShape few = LatentShape().with(3, 40);
    few.expand      = true;
    few.n_heads     = 2;
    CHECK(claimed(few));
    CHECK(claimed(few, 1200));
    CHECK(claimed(exact(few)));
    CHECK(!claimed(few, 750));
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q5_0 }) {
        CHECK(claimed(with_weights(few, type)));
    }
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        CHECK(claimed(with_cache(few, type)));
    }
    CHECK(!claimed(with_weights(few, GGML_TYPE_Q4_1)));
    CHECK(!claimed(with_cache(few, GGML_TYPE_Q5_1)));
    LatentShape small = few;
    small.n_latent    = 256;
    CHECK(!claimed(small));
    small         = few;
    small.n_value = 64;
    CHECK(!claimed(small));
}

// An argument is the capability of a device whose sums are tested, and nothing else.
int main(int argc, char ** argv) {
    if (argc > 1) {
        test_sums(atoi(argv[1]));
    } else {
        test_absorbed();
        test_memory_of_fewer_keys();
        test_runs();
        test_decompressed();
    }
    CHECK(standin_allocations == 0);  // what llama.cpp does not know of
    printf("all as it should be\n");
}
