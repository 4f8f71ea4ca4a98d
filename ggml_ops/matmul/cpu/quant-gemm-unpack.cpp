// Panels: stored weights of PANEL_ROWS rows and up to 256 values of K become a panel (quant-gemm-panel.h). And the table
// of formats: types and layouts.

#include "quant-gemm-amx.h"
#include "quant-gemm-unpack-k.h"

namespace quant_gemm {

#if QUANT_GEMM_KERNELS

// LANES rows of a panel, from `first` on.
struct PanelLanes {
    Panel & panel;
    int     first;
    int     offset;              // of the quants
    Ints    previous = ints(0);  // factors
#if QUANT_GEMM_I8MM
    Ints even = ints(0);  // the last group with an even j

    inline void codes(int b, int j, Ints x) {
        x = sub_8(x, bytes(offset));
        if (j % 2 == 0) {
            even = x;
            return;
        }
        uint8_t * to = &panel.codes[b][j - 1][0][0] + 8 * first;
        Ints      eight[2];
        eight_values(even, x, eight);
        store_ints(to, eight[0]);
        store_ints(to + sizeof(Ints), eight[1]);
    }
#else
    inline void codes(int b, int j, Ints x) const {
        store_ints(panel.codes[b][j][first], SIGNED_PANELS ? sub_8(x, bytes(offset)) : x);
    }
#endif

    inline void scales(int b, Floats x) const { store_numbers(panel.scales[b], x); }

    // with FACTOR_DIFFERENCES, minus those that follow
    inline void factors(int b, Ints x) {
        store_numbers(panel.factors[b], x);
        if constexpr (FACTOR_DIFFERENCES) {
            if (b > 0) {
                store_numbers(panel.factors[b - 1], sub_32(previous, x));
            }
            previous = x;
        }
    }

    inline void super_scales(Floats x) const { store_numbers(panel.super_scales, x); }

    inline void minimum_scales(Floats x) const { store_numbers(panel.minimum_scales, x); }

    inline void minima(int pair, Ints x) const {
#if QUANT_GEMM_NEON
        constexpr int PAIRS = MINIMA_TOGETHER / 2;
        store_pairs<MINIMA_TOGETHER>(&panel.minima_in_bytes[pair / PAIRS][first][pair % PAIRS * 2], x);
#else
        store_ints(panel.minima[pair][first], x);
#endif
    }

    inline void codes_times_4(int b, int j, Ints x) { codes(b, j, right_16(x, 2)); }

  private:
    // a number of each row
    template <typename Number, typename Vector> inline void store_numbers(Number * to, Vector x) const {
#if QUANT_GEMM_I8MM
        store_twice(to + 2 * first, x);
#else
        memcpy(to + first, &x, sizeof(x));
#endif
    }
};

#if QUANT_GEMM_AMX

// The same for tile registers: quants are multiplied by their factors, so that a sum is over 256 weights.
template <Scheme SCHEME, Codes CODES> struct TileLanes : PanelLanes {
    Ints lower_factors[SLICE / 16];  // each of them twice, in 16 bits
    Ints upper_factors[SLICE / 16];  // Q4_K and Q5_K: a factor is lower + (upper << shift)

    explicit TileLanes(const PanelLanes & lanes) : PanelLanes(lanes) {}

    // where codes of the second plane are stored
    inline uint8_t * upper(int b, int j) const { return static_cast<TilePanel &>(panel).upper_codes[b][j][first]; }

    inline void factors(int b, Ints x) {
        const Ints twice = (x & ints(0xffff)) | left_32(x, 16);
        if constexpr (SCHEME == Scheme::q8_K_mins) {
            constexpr int SHIFT = second_plane_shift(CODES);
            lower_factors[b]    = twice & _mm512_set1_epi16((1 << SHIFT) - 1);
            upper_factors[b]    = right_16(twice, SHIFT);
        } else {
            lower_factors[b] = twice;
        }
    }

    // Two minima of 16 weights: groups of four, and 16 times as large.
    inline void minima(int pair, Ints x) {
        if constexpr (SCHEME != Scheme::q8_K_256_mins) {
            PanelLanes::minima(pair, x);
        } else if (pair % 2 == 0) {
            previous = x;
        } else {
            const Ints four = previous | left_32(x, 8);
            store_ints(upper(0, pair / 2), four);
            store_ints(upper(0, SLICE / 64 + pair / 2), left_16(four, 4));
        }
    }

    inline void codes(int b, int j, Ints x) {
        if (b % 4 == 0 && j == 0) {
            keep_tiles_awake();
        }
        if constexpr (SCHEME == Scheme::q8_K_256 || SCHEME == Scheme::q8_K_256_mins) {
            PanelLanes::codes(b, j, x);
        } else if constexpr (SCHEME ==
                             Scheme::q8_K_mins) {  // products fit in bytes, so none carries into its neighbour
            store_ints(panel.codes[b][j][first], _mm512_mullo_epi16(x, lower_factors[b]));
            store_ints(upper(b, j), _mm512_mullo_epi16(x, upper_factors[b]));
        } else {
            const Ints factor = lower_factors[SCHEME == Scheme::q8_K_16 ? 2 * b + j / 4 : b];
            const Ints shift  = _mm512_set1_epi16((short) offset);
            const Ints low    = _mm512_set1_epi16(0xff);
            const Ints even   = _mm512_mullo_epi16(_mm512_sub_epi16(x & low, shift), factor);
            const Ints odd    = _mm512_mullo_epi16(_mm512_sub_epi16(right_16(x, 8), shift), factor);
            store_ints(panel.codes[b][j][first], (even & low) | left_16(odd, 8));
            store_ints(upper(b, j), right_16(even, 8) | (odd & left_16(low, 8)));
        }
    }
};

#endif

// ---- plain numbers

// Two values of k per vector of rows, for tiles that widen them.
template <Scheme SCHEME_> struct Halves {
    static constexpr Scheme SCHEME = SCHEME_;
    static constexpr int    OFFSET = 0;
    static constexpr Codes  CODES  = Codes::bytes;

    static inline void unpack(const Rows & rows, int64_t block, int n_blocks, const PanelLanes & to) {
        for (int k = 0; k < n_blocks * BLOCK; k += 8) {
            Ints x[4];
            rows.load16((block * BLOCK + k) * sizeof(ggml_fp16_t), x);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                store_ints(to.panel.halves[k / 2 + j][to.first / LANES], halves_apart(x[j]));
            }
        }
    }
};

using F16 = Halves<Scheme::f16>;

#if QUANT_GEMM_BF16

struct BF16 {
    static constexpr Scheme SCHEME = Scheme::bf16;
    static constexpr int    OFFSET = 0;
    static constexpr Codes  CODES  = Codes::bytes;

    static inline void unpack(const Rows & rows, int64_t block, int n_blocks, const PanelLanes & to) {
        for (int b = 0; b < n_blocks; b++) {
            for (int quarter = 0; quarter < 4; quarter++) {
                Ints x[4];
                rows.load16(((block + b) * BLOCK + quarter * 8) * sizeof(ggml_bf16_t), x);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    store_ints(to.panel.pairs[b][4 * quarter + j][to.first], x[j]);
                }
            }
        }
    }
};

#else

using BF16 = Halves<Scheme::bf16>;

#endif

// ---- the table

template <typename R, typename Type, typename To = PanelLanes>
static void
unpack(const char * weights, size_t stride, int64_t row, int64_t n_rows, int64_t block, int n_blocks, Panel & panel) {
    for (int first = 0; first < PANEL_ROWS; first += LANES) {
        To to(PanelLanes{ panel, first, Type::OFFSET });
        Type::unpack(R(weights, stride, row + first, n_rows), block, n_blocks, to);
    }
}

// The number of columns from which panels are faster. `with_avx512` was measured for each type. With AVX2, dot products
// have four columns at once, and more columns take a second pass; 5 and 6 were measured on a Zen 3, 5 also with AVX-VNNI
// on a Zen 5. The numbers for NEON are older.
static constexpr int least_columns(Scheme scheme, int with_avx512) {
    if (QUANT_GEMM_AVX512) {
        return with_avx512;
    }
    if (QUANT_GEMM_AVX2) {
        return is_plain(scheme) ? 6 : 5;
    }
    return is_plain(scheme) ? 20 : 9;
}

template <typename R, typename Type>
static constexpr Format format_of(ggml_type type, quant_gemm_layout layout, int min_columns) {
    return { type,
             layout,
             Type::SCHEME,
             Type::OFFSET,
             Type::CODES,
             unpack<R, Type>,
             least_columns(Type::SCHEME, min_columns),
             nullptr,
             0 };
}

template <typename Type> static constexpr Format rows(ggml_type type, int min_columns) {
    return format_of<Rows, Type>(type, QUANT_GEMM_ROWS, min_columns);
}

// The same for a type that tile registers multiply, too. min_tile_columns was measured on a Xeon "Emerald Rapids".
template <typename Type>
static constexpr Format tiled_rows(ggml_type type, int min_columns, [[maybe_unused]] int min_tile_columns) {
    Format format = rows<Type>(type, min_columns);
#if QUANT_GEMM_AMX
    using Lanes = std::conditional_t<is_plain(Type::SCHEME), PanelLanes, TileLanes<Type::SCHEME, Type::CODES>>;
    format.unpack_for_tiles = unpack<Rows, Type, Lanes>;
    format.min_tile_columns = min_tile_columns;
#endif
    return format;
}

static const Format formats[] = {
    rows<Q4_0>(GGML_TYPE_Q4_0, 5),
    rows<Q5_0>(GGML_TYPE_Q5_0, 4),
    rows<Q8_0>(GGML_TYPE_Q8_0, 9),
    rows<IQ4_NL>(GGML_TYPE_IQ4_NL, 4),
    rows<MXFP4>(GGML_TYPE_MXFP4, 4),
    tiled_rows<Q2_K>(GGML_TYPE_Q2_K, 5, 5),
    tiled_rows<Q3_K>(GGML_TYPE_Q3_K, 5, 5),
    tiled_rows<Q4_K>(GGML_TYPE_Q4_K, 5, 33),
    tiled_rows<Q5_K>(GGML_TYPE_Q5_K, 5, 33),
    tiled_rows<Q6_K>(GGML_TYPE_Q6_K, 17, 17),
    tiled_rows<IQ4_XS>(GGML_TYPE_IQ4_XS, 5, 33),
    rows<F16>(GGML_TYPE_F16, 20),
#if QUANT_GEMM_BF16
    tiled_rows<BF16>(GGML_TYPE_BF16, 33, 9),
#elif !QUANT_GEMM_AVX512
    rows<BF16>(GGML_TYPE_BF16, 33),
#endif
#if QUANT_GEMM_AVX512
    format_of<Groups, Q4_0Groups>(GGML_TYPE_Q4_0, QUANT_GEMM_8X8, 13),
    format_of<Groups, IQ4_NLGroups>(GGML_TYPE_IQ4_NL, QUANT_GEMM_8X8, 13),
    format_of<Groups, MXFP4Groups>(GGML_TYPE_MXFP4, QUANT_GEMM_8X8, 13),
    format_of<Groups, Q2_KGroups>(GGML_TYPE_Q2_K, QUANT_GEMM_8X8, 5),
#endif
};

const Format * find_format(ggml_type type, quant_gemm_layout layout) {
    for (const Format & format : formats) {
        if (format.type == type && format.layout == layout) {
            return &format;
        }
    }
    return nullptr;
}

#else

const Format * find_format(ggml_type, quant_gemm_layout) {
    return nullptr;
}

#endif

}  // namespace quant_gemm
