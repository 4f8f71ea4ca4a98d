// Few columns: LANES rows of a matrix are multiplied at once, in the layout of the file, so that they stream from
// memory. What a panel would store (quant-gemm-unpack.cpp) is multiplied at once with all columns instead. The float
// operations are those of a tile, with a row in each lane. With NEON, whose vectors have as many lanes as it takes rows,
// quants are not transposed: the integer sums of each row are in a vector, and its lanes are added at the end.

#include "quant-gemm-dot.h"

#include "quant-gemm-unpack-k.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace quant_gemm {

#if QUANT_GEMM_KERNELS

static bool is_zen_5_or_later() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx) {
        __get_cpuid(1, &a, &b, &c, &d);
        return (a >> 8 & 0xf) + (a >> 20 & 0xff) >= 0x1a;
    }
#endif
    return false;
}

bool prefetches_in_order() {
    static const bool in_order = environment_switch("KIMI_PREFETCH_IN_ORDER", is_zen_5_or_later());
    return in_order;
}

// Integer sums of LANES rows with one column:
//   start_at        what they begin with, to be more by the number at p
//   add_codes       adds the products of quants j of a block (codes of Type::unpack) with the column's quants of the block
//   sums_of_rows    the sums, a row in each lane
#if QUANT_GEMM_NEON

using DotRows = RowsApart;
using RowSums = Ints[LANES];  // of a row, in the lanes of a vector

static inline Ints start_at(const int32_t * p) {
    return first_lane(*p);
}

template <Codes CODES> static inline void add_codes(RowSums & sums, int j, Ints x, const int8_t * column) {
    sums[j % LANES] = add_products<CODES>(sums[j % LANES], x, load_ints(column + j / LANES * 16));
}

static inline Ints sums_of_rows(const RowSums & sums) {
    return sums_of_lanes(sums);
}

#else

using DotRows = Rows;
using RowSums = Ints[1];

static inline Ints start_at(const int32_t * p) {
    return broadcast_ints(p);
}

template <Codes CODES> static inline void add_codes(RowSums & sums, int j, Ints x, const int8_t * column) {
    sums[0] = add_products<CODES>(sums[0], x, broadcast_ints(column + 4 * j));
}

static inline Ints sums_of_rows(const RowSums & sums) {
    return sums[0];
}

#endif

constexpr int SUM_VECTORS = sizeof(RowSums) / sizeof(Ints);

// Prefetches part b of the next rows, of SIZE bytes, if there is anything `ahead`. With VNNI into L1, which is faster than L2
// on a Zen 5 with two threads; otherwise into L2.
template <int SIZE> static inline __attribute__((always_inline)) void prefetch_part(const char * ahead, int b) {
    if (ahead != nullptr) {
        prefetch<SUMS_OF_16_BITS ? 2 : 3>(ahead + b * SIZE, SIZE);
    }
}

// ---- types of 32 values with one scale

// Receives a slice of the weights, multiplies it with slice i of the columns, and adds the products to the totals.
template <typename Type, typename Block, int N_C> struct BlockProducts {
    static constexpr int TOGETHER = groups_together(Type::CODES);
    static constexpr int AHEAD    = LANES * sizeof(Block);  // bytes to prefetch for each block

    const char * const * columns;
    int64_t              i;
    const char *         ahead;  // what is prefetched while the slice is multiplied, or nullptr
    Floats (&total)[N_C];
    RowSums sums[N_C];
    Ints    z[N_C];  // of a block

    BlockProducts(const char * const * columns, int64_t i, const char * ahead, Floats (&total)[N_C]) :
        columns(columns), i(i), ahead(ahead), total(total) {}

    const ActBlocks & acts(int c) const { return ((const ActBlocks *) columns[c])[i]; }

    inline void codes(int b, int j, Ints x) {
        if (j == 0) {
            prefetch_part<AHEAD>(ahead, b);
        }
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const Ints start = Type::OFFSET == 0 ? ints(0) : start_at(&acts(c).starts[b]);
            if (j == 0 && SUMS_OF_16_BITS) {
                z[c] = start;
            }
            if (j % TOGETHER < SUM_VECTORS) {
                sums[c][j % SUM_VECTORS] = SUMS_OF_16_BITS ? ints(0) : start;
            }
            add_codes<Type::CODES>(sums[c], j, x, acts(c).codes[b]);
            if (j % TOGETHER == TOGETHER - 1) {
                const Ints total = total_of(sums_of_rows(sums[c]));
                z[c]             = SUMS_OF_16_BITS ? add_32(z[c], total) : total;
            }
        }
    }

    inline void scales(int b, Floats d) {
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            total[c] = add_block(total[c], z[c], d, broadcast_floats(&acts(c).scales[b]));
        }
    }

    void finish() {}
};

// ---- types of 256 values

template <typename Type, typename Block, int N_C> struct SuperBlockProducts {
    static constexpr int SUB      = weights_per_factor(Type::SCHEME);
    static constexpr int TOGETHER = std::min(groups_together(Type::CODES), SUB / 4);
    static constexpr int AHEAD    = LANES * sizeof(Block) / N_BLOCKS;
    // Sums are not reset between blocks, so each is multiplied by the difference between its factor and the next one.
    static constexpr bool GO_ON = QUANT_GEMM_NEON && Type::SCHEME == Scheme::q8_K && Type::OFFSET == 0;

    const char * const * columns;
    int64_t              i;
    const char *         ahead;
    Floats (&total)[N_C];
    Ints     factor[SLICE / 16];
    RowSums  sums[N_C];
    Ints     products[N_C];
    Ints     fourfold[N_C];  // products times four
    PairSums minimum[N_C];
    Floats   d;
    Floats   dmin;

    SuperBlockProducts(const char * const * columns, int64_t i, const char * ahead, Floats (&total)[N_C]) :
        columns(columns), i(i), ahead(ahead), total(total) {
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            products[c] = ints(0);
            fourfold[c] = ints(0);
            minimum[c]  = PairSums();
            sums[c][0]  = Type::SCHEME == Scheme::q8_K_256 ? broadcast_ints(&acts(c).start) : ints(0);
        }
    }

    const ActSuperBlock & acts(int c) const { return ((const ActSuperBlock *) columns[c])[i]; }

    inline void factors(int b, Ints x) {
        factor[b] = x;
        if (GO_ON && b > 0) {
            factor[b - 1] = sub_32(factor[b - 1], x);
        }
    }

    inline void codes(int b, int j, Ints x) { add(b, j, x, products); }

    inline void codes_times_4(int b, int j, Ints x) { add(b, j, x, fourfold); }

    inline void add(int b, int j, Ints x, Ints (&to)[N_C]) {
        const int sub = SUB == 16 ? 2 * b + j / 4 : b;
        if (j == 0) {
            prefetch_part<AHEAD>(ahead, b);
        }
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            if (SUB != SLICE && j % TOGETHER < SUM_VECTORS && !(GO_ON && b > 0)) {
                constexpr bool STARTS    = has_starts(Type::SCHEME) && Type::OFFSET != 0;
                sums[c][j % SUM_VECTORS] = STARTS ? start_at(&acts(c).starts[sub]) : ints(0);
            }
            add_codes<Type::CODES>(sums[c], j, x, acts(c).codes + BLOCK * b);
            if (SUB != SLICE && j % TOGETHER == TOGETHER - 1) {
                const Ints sum = sums_of_rows(sums[c]);
                to[c]          = add_32(to[c], total_times(sum, factor[sub]));
                if constexpr (GO_ON) {
                    keep_until(sums[c], sum);
                }
            }
        }
    }

    inline void minima(int pair, Ints x) {
        constexpr bool BY_16 = weights_per_minimum(Type::SCHEME) == 16;
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const int16_t * a = BY_16 ? acts(c).sums_16 : acts(c).sums;
            minimum[c]        = add_pairs(minimum[c], x, broadcast_ints(a + 2 * pair));
        }
    }

    inline void super_scales(Floats x) { d = x; }

    inline void minimum_scales(Floats x) { dmin = x; }

    inline void finish() {
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const Ints   parts = add_32(products[c], right_signed_32(fourfold[c], 2));
            const Ints   whole = SUB == SLICE ? sums[c][0] : parts;
            const Ints   less  = total_of_pairs(minimum[c]);
            const Floats scale = broadcast_floats(&acts(c).scale);
            if constexpr (has_minima(Type::SCHEME)) {
                total[c] = add_super_block(total[c], whole, d, less, dmin, scale);
            } else {
                total[c] = add_super_block(total[c], sub_32(whole, less), d, scale);
            }
        }
    }
};

template <typename Type, typename Block>
constexpr size_t SLICE_SIZE = (Type::SCHEME == Scheme::q8_0 ? N_BLOCKS : 1) * sizeof(Block);

// Whether the rows to be prefetched follow each other without gaps, and are prefetched in the order of memory, a part for
// each block. That is faster with AVX2 (Zen 3), with AVX-VNNI except for Q6_K and MXFP4 (Zen 5; Intel was not measured), and
// with AVX-512 on a Zen 5, where only IQ4_XS is computed here. Otherwise NextRows prefetches all at once, before the slice
// is unpacked, on a Zen 5 also in the order of memory.
template <typename Type, typename Block> static inline bool in_memory_order(const WeightRows & weights, int64_t k) {
    constexpr bool SLOWER = !SUMS_OF_16_BITS && IS_ONE_OF<Block, block_q6_K, block_mxfp4>;
    const bool     faster = QUANT_GEMM_AVX512 ? prefetches_in_order() : QUANT_GEMM_AVX2 && !SLOWER;
    return faster && weights.stride == k / BLOCK * SLICE_SIZE<Type, Block> / N_BLOCKS;
}

// Adds the products of the blocks of 32 from `first` on, the beginning of a slice.
template <typename Type, typename Block, int N_C>
static inline void add_products_of_rows(
    const WeightRows & weights, int64_t first, int64_t k, const char * const * columns, Floats (&total)[N_C]) {
    using Products             = std::conditional_t<Type::SCHEME == Scheme::q8_0, BlockProducts<Type, Block, N_C>,
                                                    SuperBlockProducts<Type, Block, N_C>>;
    constexpr size_t SIZE      = SLICE_SIZE<Type, Block>;
    const bool       by_memory = in_memory_order<Type, Block>(weights, k);
    const int64_t    n_blocks  = k / BLOCK;
    const NextRows   next(weights, LANES, n_blocks * SIZE / N_BLOCKS);
    const DotRows    rows(weights.first, weights.stride, 0, weights.n);
    for (; first < n_blocks; first += N_BLOCKS) {
        const int    n  = (int) std::min<int64_t>(N_BLOCKS, n_blocks - first);
        const size_t at = first / N_BLOCKS * SIZE;
        for (int r = 0; r < LANES && !by_memory; r++) {
            next.prefetch(r, at, n * SIZE / N_BLOCKS);
        }
        Products to(columns, first / N_BLOCKS, by_memory ? weights.next + LANES * at : nullptr, total);
        Type::unpack(rows, first, n, to);
        to.finish();
    }
}

template <int N_C> static inline void store_totals(const Floats (&total)[N_C], float * sums) {
#pragma GCC                           unroll 4
    for (int c = 0; c < N_C; c++) {
        store_floats(sums + c * PANEL_ROWS, total[c]);
    }
}

template <typename Type, typename Block, int N_C>
static void dot_lanes(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    Floats total[N_C];
    std::fill(total, total + N_C, floats(0.0f));
    add_products_of_rows<Type, Block>(weights, 0, k, columns, total);
    store_totals(total, sums);
}

#if QUANT_GEMM_AVX2

// ---- Q4_0 with sums of 16 bits: two blocks are read as nine words, scales included, because loading the scales of 8
// rows one by one takes about as long as loading their quants. The nine words: the first scale and values 0, 1; three
// words of values; values 14, 15 and the second scale; four words of values. (In the upper nibbles: 16 to 31.)

template <int N_C> struct TwoBlocksProducts {
    static constexpr int WORDS = 2 * sizeof(block_q4_0) / 4;

    const ActBlocks * acts[N_C];
    const char *      ahead;  // what is prefetched while the slice is multiplied
    Floats (&total)[N_C];
    Ints   sums[N_C];
    Ints   first_word;
    Floats second_scale;

    TwoBlocksProducts(const char * const * columns, int64_t slice, const char * ahead, Floats (&total)[N_C]) :
        ahead(ahead), total(total) {
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            acts[c] = (const ActBlocks *) columns[c] + slice;
        }
    }

    // GCC would prefetch for all blocks at the beginning of the slice, which is slower, if the address did not depend on
    // x, the word before.
    inline void begin(int b, Ints x) {
        asm("" : "+r"(ahead) : "x"(x));
        prefetch<2>(ahead + b * LANES * sizeof(block_q4_0), LANES * sizeof(block_q4_0));
        std::fill(sums, sums + N_C, ints(0));
    }

    // Values `at` to `at + 3` and `at + 16` to `at + 19` of block b.
    inline void add(int b, int at, Ints low, Ints high) {
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const char * column = (const char *) acts[c] + BLOCK * b + at;
            sums[c]             = add_products<Q4_0::CODES>(sums[c], low, broadcast_ints(column));
            sums[c]             = add_products<Q4_0::CODES>(sums[c], high, broadcast_ints(column + BLOCK / 2));
        }
    }

    inline void end(int b, Floats scale) {
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            const Ints z = add_32(broadcast_ints(&acts[c]->starts[b]), total_of(sums[c]));
            total[c]     = add_block(total[c], z, scale, broadcast_floats(&acts[c]->scales[b]));
        }
    }

    // Word i of the slice.
    inline void word(int i, Ints x) {
        const int b    = i / WORDS * 2;
        const int part = i % WORDS;
        if (part == 0) {
            begin(b, x);
            first_word        = x;
            const Ints values = right_32(x, 16);  // two, and two zeros
            add(b, 0, low_nibbles(values), high_nibbles(values));
        } else if (part < 4) {
            add(b, 4 * part - 2, low_nibbles(x), high_nibbles(x));
        } else if (part == 4) {
            // into the upper half of a lane, as values 0 and 1 are in the lower one: 8 products fit in 16 bits
            const Ints values = left_32(x, 16);
            add(b, 12, low_nibbles(values), high_nibbles(values));
            const Ints scales = halves_apart(join_halves(first_word, x));
            second_scale      = _mm256_cvtph_ps(_mm256_extracti128_si256(scales, 1));
            end(b, _mm256_cvtph_ps(_mm256_castsi256_si128(scales)));
            begin(b + 1, x);
        } else {
            add(b + 1, 4 * part - 20, low_nibbles(x), high_nibbles(x));
        }
        if (part == WORDS - 1) {
            end(b + 1, second_scale);
        }
    }
};

template <int N_C>
static void dot_q4_0(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    constexpr int N_WORDS = SLICE_SIZE<Q4_0, block_q4_0> / 4;
    const int64_t end     = in_memory_order<Q4_0, block_q4_0>(weights, k) ? k / SLICE : 0;
    const Rows    rows(weights.first, weights.stride, 0, weights.n);
    Floats        total[N_C];
    std::fill(total, total + N_C, floats(0.0f));
    for (int64_t slice = 0; slice < end; slice++) {
        const size_t           at = slice * N_WORDS * 4;
        TwoBlocksProducts<N_C> to(columns, slice, weights.next + LANES * at, total);
#pragma GCC unroll 9
        for (int i = 0; i < N_WORDS; i += 4) {
            Ints x[4];
            rows.load16(at + 4 * i, x);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                to.word(i + j, x[j]);
            }
        }
    }
    if (end * SLICE < k) {
        add_products_of_rows<Q4_0, block_q4_0>(weights, end * N_BLOCKS, k, columns, total);
    }
    store_totals(total, sums);
}

#endif

// ---- plain numbers: a row at a time. A lane sums every LANES-th number of K, in two sums; tiles have one sum for each
// element of the result.

template <int N_C> static inline void store_row(const Floats (&even)[N_C], const Floats (&odd)[N_C], float * sums) {
#pragma GCC                           unroll 4
    for (int c = 0; c < N_C; c++) {
        sums[c * PANEL_ROWS] = sum_lanes(add(even[c], odd[c]));
    }
}

#if QUANT_GEMM_BF16

static inline __m512bh pairs_of(const void * p) {
    return (__m512bh) _mm512_loadu_si512(p);
}

// Two vectors of 32 values at once; the instruction sums pairs. K is a multiple of 32.
template <int N_C> static void dot_row_bf16(const char * row, int64_t k, const char * const * columns, float * sums) {
    __m512        even[N_C] = {};
    __m512        odd[N_C]  = {};
    const int64_t size      = k * (int64_t) sizeof(ggml_bf16_t);
    int64_t       at        = 0;
    for (; at + 128 <= size; at += 128) {
        prefetch_behind(row + at, 128);
        const __m512bh first  = pairs_of(row + at);
        const __m512bh second = pairs_of(row + at + 64);
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            even[c] = _mm512_dpbf16_ps(even[c], first, pairs_of(columns[c] + at));
            odd[c]  = _mm512_dpbf16_ps(odd[c], second, pairs_of(columns[c] + at + 64));
        }
    }
    if (at < size) {
#pragma GCC unroll 4
        for (int c = 0; c < N_C; c++) {
            even[c] = _mm512_dpbf16_ps(even[c], pairs_of(row + at), pairs_of(columns[c] + at));
        }
    }
    store_row(even, odd, sums);
}

#endif

// 16-bit numbers that WIDEN makes float32, as activations are. K is a multiple of 32.
template <Floats (*WIDEN)(const void *), int N_C>
static void dot_row(const char * row, int64_t k, const char * const * columns, float * sums) {
    Floats even[N_C], odd[N_C];
    std::fill(even, even + N_C, floats(0.0f));
    std::fill(odd, odd + N_C, floats(0.0f));
    for (int64_t i = 0; i < k; i += 32) {
        prefetch_behind(row + i * 2, CACHE_LINE);
#pragma GCC unroll 4
        for (int64_t j = i; j < i + 32; j += 2 * LANES) {
            const Floats first  = WIDEN(row + j * 2);
            const Floats second = WIDEN(row + (j + LANES) * 2);
#pragma GCC unroll 4
            for (int c = 0; c < N_C; c++) {
                const float * x = (const float *) columns[c] + j;
                even[c]         = fma(first, load_floats(x), even[c]);
                odd[c]          = fma(second, load_floats(x + LANES), odd[c]);
            }
        }
    }
    store_row(even, odd, sums);
}

using DotRow = void(const char * row, int64_t k, const char * const * columns, float * sums);

template <DotRow * ROW>
static void dot_plain_rows(const WeightRows & weights, int64_t k, const char * const * columns, float * sums) {
    for (int r = 0; r < std::min<int64_t>(DOT_ROWS, weights.n); r++) {
        ROW(weights.first + r * weights.stride, k, columns, sums + r);
    }
}

// ---- selection

template <typename Type, typename Block>
static constexpr Dot LANES_OF = { LANES,
                                  { dot_lanes<Type, Block, 1>, dot_lanes<Type, Block, 2>, dot_lanes<Type, Block, 3>,
                                    dot_lanes<Type, Block, 4> } };

#if QUANT_GEMM_AVX2
static constexpr Dot ROWS_OF_Q4_0 = {
    LANES, { dot_q4_0<1>, dot_q4_0<2>, dot_lanes<Q4_0, block_q4_0, 3>, dot_lanes<Q4_0, block_q4_0, 4> }
};
#endif

template <Floats (*WIDEN)(const void *)>
static constexpr Dot PLAIN_ROWS = { DOT_ROWS,
                                    { dot_plain_rows<dot_row<WIDEN, 1>>, dot_plain_rows<dot_row<WIDEN, 2>>,
                                      dot_plain_rows<dot_row<WIDEN, 3>>, dot_plain_rows<dot_row<WIDEN, 4>> } };

static const TypedDot DOTS[] = {
    { GGML_TYPE_IQ4_XS, LANES_OF<IQ4_XS, block_iq4_xs> },
#if QUANT_GEMM_AVX2
    { GGML_TYPE_Q4_0, SUMS_OF_16_BITS ? ROWS_OF_Q4_0 : LANES_OF<Q4_0, block_q4_0> },
#elif !QUANT_GEMM_AVX512
    { GGML_TYPE_Q4_0, LANES_OF<Q4_0, block_q4_0> },
#endif
#if !QUANT_GEMM_AVX512
    { GGML_TYPE_Q5_0, LANES_OF<Q5_0, block_q5_0> },
    { GGML_TYPE_Q8_0, LANES_OF<Q8_0, block_q8_0> },
    { GGML_TYPE_IQ4_NL, LANES_OF<IQ4_NL, block_iq4_nl> },
    { GGML_TYPE_MXFP4, LANES_OF<MXFP4, block_mxfp4> },
    { GGML_TYPE_Q2_K, LANES_OF<Q2_K, block_q2_K> },
    { GGML_TYPE_Q3_K, LANES_OF<Q3_K, block_q3_K> },
    { GGML_TYPE_Q4_K, LANES_OF<Q4_K, block_q4_K> },
    { GGML_TYPE_Q5_K, LANES_OF<Q5_K, block_q5_K> },
    { GGML_TYPE_Q6_K, LANES_OF<Q6_K, block_q6_K> },
#endif
    { GGML_TYPE_F16, PLAIN_ROWS<from_halves> },
#if QUANT_GEMM_BF16
    { GGML_TYPE_BF16,
      { DOT_ROWS,
        { dot_plain_rows<dot_row_bf16<1>>, dot_plain_rows<dot_row_bf16<2>>, dot_plain_rows<dot_row_bf16<3>>,
          dot_plain_rows<dot_row_bf16<4>> } } },
#else
    { GGML_TYPE_BF16, PLAIN_ROWS<from_bf16> },
#endif
};

const Dot & dot_of(const Format & format) {
    const Dot * dot = nullptr;
#if QUANT_GEMM_AVX512
    dot = format.layout == QUANT_GEMM_8X8 ? find_dot_of_groups(format.type) : find_dot_of_rows(format.type);
#endif
    dot = dot != nullptr ? dot : find_dot(DOTS, format.type);
    GGML_ASSERT(dot != nullptr);
    return *dot;
}

#else

const Dot & dot_of(const Format &) {
    GGML_ABORT("never called: there is no format");
}

#endif

DotOperand::DotOperand(const Format & format, int64_t k) : dot(dot_of(format)), k(k) {}

const char * DotOperand::expanded(int column, const char * packed) {
    const size_t size = dot.expansion.size;
    Expanded &   to   = copies[column];
    if (to.memory == nullptr) {
        to.memory.reset(new Line[k / SLICE * size / CACHE_LINE]);
    }
    char * bytes = to.memory[0].bytes;
    if (to.packed != packed) {
        for (int64_t i = 0; i < k / SLICE; i++) {
            dot.expansion.expand(((const ActSuperBlock *) packed)[i], bytes + i * size);
        }
        to.packed = packed;
    }
    return bytes;
}

void DotOperand::set_columns(Columns these) {
    columns = these;
    if (dot.expansion.size == 0) {
        return;
    }
    copies.resize(std::max<size_t>(copies.size(), columns.n));
    pointers.resize(columns.n);
    for (int c = 0; c < columns.n; c++) {
        pointers[c] = expanded(c, columns.at[c]);
    }
    columns.at = pointers.data();
}

void DotOperand::multiply(const WeightRows & weights, float * sums) const {
    // weights are read from memory once; columns that do not all fit in L1 are processed in groups, with rows from L2
    const int turn = columns.n > 2 * DOT_COLUMNS ? DOT_COLUMNS : columns.n;
    for (int first = 0; first < columns.n; first += turn) {
        const int end = std::min(first + turn, columns.n);
        for (int64_t r = 0; r < weights.n; r += dot.rows) {
            WeightRows some = { weights.first + r * weights.stride, weights.stride, weights.n - r, weights.next };
            if (some.n > dot.rows) {
                some.next = some.first + dot.rows * weights.stride;
            }
            for (int c = first; c < end; c += DOT_COLUMNS) {
                const int together = std::min(end - c, DOT_COLUMNS);
                dot.multiply[together - 1](some, k, columns.at + c, sums + c * PANEL_ROWS + r);
            }
        }
    }
}

}  // namespace quant_gemm
