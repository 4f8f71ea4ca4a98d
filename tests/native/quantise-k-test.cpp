// Q4_K, Q5_K and Q6_K are bit-identical to ggml's own loops over single blocks, which are still available as the types'
// from_float_ref: ordinary and hostile values, any number of blocks; through ggml_quantize_chunk, and directly with
// every vector width that the CPU supports, for which the source is included. Prints one line per failure and the
// count; exit status 1 if there was a failure.

#include "quantize_k/ggml-quantize-k.cpp"

#include "check.h"
#include "ggml.h"

#include <functional>
#include <random>
#include <vector>

using Form = std::function<void(ggml_type, const float *, uint8_t *, int64_t)>;

#if defined(__x86_64__)

template <typename Block> static void by_width(int width, const float * x, uint8_t * y, int64_t k) {
    const auto run = width == 16 ? by_16<Block> : width == 8 ? by_8<Block> : by_4<Block>;
    run(x, (Block *) y, k / QK_K);
}

static Form of_width(int width) {
    return [width](ggml_type type, const float * x, uint8_t * y, int64_t k) {
        type == GGML_TYPE_Q4_K   ? by_width<block_q4_K>(width, x, y, k)
        : type == GGML_TYPE_Q5_K ? by_width<block_q5_K>(width, x, y, k)
                                 : by_width<block_q6_K>(width, x, y, k);
    };
}

#endif

int main() {
    constexpr int64_t               BLOCK = 256;
    std::mt19937                    rng(11);
    std::normal_distribution<float> normal;
    const auto                      draw = [&] { return normal(rng); };

    const struct {
        const char *                        name;
        std::function<float(int64_t index)> value;
    } kinds[] = {
        { "weights", [&](int64_t) { return 0.02f * draw(); } },
        { "rounded to bf16",
          [&](int64_t) {
              const float x = 0.02f * draw();
              uint32_t    bits;
              memcpy(&bits, &x, sizeof(bits));
              bits &= 0xffff0000u;
              float y;
              memcpy(&y, &bits, sizeof(y));
              return y;
          } },
        { "large", [&](int64_t) { return 1e4f * draw(); } },
        { "positive", [&](int64_t) { return fabsf(draw()); } },
        { "negative", [&](int64_t) { return -fabsf(draw()); } },
        { "one in a block", [&](int64_t i) { return i % BLOCK == 77 ? draw() : 0.0f; } },
        { "blocks of zeros", [&](int64_t i) { return i / BLOCK % 3 == 1 ? 0.0f : draw(); } },
        { "parts of zeros", [&](int64_t i) { return i / 32 % 5 == 2 ? 0.0f : draw(); } },
        { "constant parts", [&](int64_t i) { return i / 32 % 4 == 1 ? 0.25f : draw(); } },
        { "constant", [&](int64_t) { return 0.5f; } },
        { "denormal", [&](int64_t) { return 1e-39f * draw(); } },
        { "below every scale", [&](int64_t) { return 1e-20f * draw(); } },
        { "of any magnitude", [&](int64_t) { return draw() * expf(6 * draw()); } },
        { "halves", [&](int64_t) { return roundf(2 * draw()) / 2; } },
    };

    std::vector<std::pair<const char *, Form>> forms = {
        { "ggml_quantize_chunk", [](ggml_type type, const float * x, uint8_t * y,
                                    int64_t k) { ggml_quantize_chunk(type, x, y, 0, 1, k, nullptr); } },
    };
#if defined(__x86_64__)
    forms.push_back({ "vectors of 4", of_width(4) });
    if (__builtin_cpu_supports("avx2")) {
        forms.push_back({ "vectors of 8", of_width(8) });
    }
    if (__builtin_cpu_supports("avx512f")) {
        forms.push_back({ "vectors of 16", of_width(16) });
    }
#endif

    for (const ggml_type type : { GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K }) {
        for (const auto & kind : kinds) {
            for (const int64_t n_blocks : { 1, 2, 3, 9, 200 }) {
                std::vector<float> x(n_blocks * BLOCK);
                for (size_t i = 0; i < x.size(); i++) {
                    x[i] = kind.value((int64_t) i);
                }
                const size_t         size = ggml_row_size(type, (int64_t) x.size());
                std::vector<uint8_t> theirs(size, 1);
                ggml_get_type_traits(type)->from_float_ref(x.data(), theirs.data(), (int64_t) x.size());
                for (const auto & form : forms) {
                    std::vector<uint8_t> ours(size, 2);
                    form.second(type, x.data(), ours.data(), (int64_t) x.size());
                    expect(theirs == ours,
                           text("%s, %s, %d blocks, %s", ggml_type_name(type), kind.name, (int) n_blocks, form.first));
                }
            }
        }
    }
    return report();
}
