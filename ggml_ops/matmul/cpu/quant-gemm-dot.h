#pragma once

// Few columns: weights are multiplied in their layout, unpacked into registers once for up to DOT_COLUMNS columns: LANES
// rows at a time (quant-gemm-dot.cpp), with AVX-512 also one or four rows (quant-gemm-dot-rows.cpp) or one group of
// interleaved rows (quant-gemm-dot-groups.cpp). The sums of quantized weights have the same bits as those of the tiles
// (quant-gemm-tile.cpp), for any number of columns.

#include "quant-gemm-panel.h"

#include <memory>
#include <vector>

namespace quant_gemm {

constexpr int DOT_COLUMNS = 4;
constexpr int DOT_ROWS    = 16;  // rows that most kernels multiply at once, one per lane

// Rows of weights, stride bytes apart.
struct WeightRows {
    const char * first;
    size_t       stride;
    int64_t      n;
    const char * next;  // rows that are multiplied afterwards, to be prefetched; `first` if there are none
};

// Multiplies up to Dot::rows rows of k weights with packed rows of activations: sums[column * PANEL_ROWS + row]. It may
// write sums of all Dot::rows rows.
using DotColumns = void (*)(const WeightRows & w, int64_t k, const char * const * columns, float * sums);

// A form of 256 packed activations that some kernels read instead, four times as large. Each thread makes its own, once for
// many rows: reading what another core has written takes longer than expanding it again.
struct Expansion {
    size_t size                                           = 0;        // in bytes, a multiple of CACHE_LINE
    void (*expand)(const ActSuperBlock & from, void * to) = nullptr;  // to: aligned to CACHE_LINE
};

struct Dot {
    int        rows;                   // rows per call
    DotColumns multiply[DOT_COLUMNS];  // for 1, 2, ... columns
    Expansion  expansion = {};         // of the columns, if its size is not 0
};

struct TypedDot {
    ggml_type type;
    Dot       dot;
};

// The entry of the type, or nullptr.
template <size_t N> const Dot * find_dot(const TypedDot (&dots)[N], ggml_type type) {
    for (const TypedDot & each : dots) {
        if (each.type == type) {
            return &each.dot;
        }
    }
    return nullptr;
}

// The kernels for matrices with fewer columns than the format's min_columns.
const Dot & dot_of(const Format & format);

// AVX-512: kernels of interleaved rows, and of types that are faster row by row, or nullptr.
const Dot * find_dot_of_groups(ggml_type type);
const Dot * find_dot_of_rows(ggml_type type);

// The columns of dot products as the kernels of a format read them, for one thread. Packed rows must not change while the
// object exists: a column that follows itself is not expanded again.
class DotOperand {
  public:
    // k: activations in a column.
    DotOperand(const Format & format, int64_t k);

    // Packed rows. columns.at must live until the next call.
    void set_columns(Columns columns);

    // Rows of weights times the columns: sums[column * PANEL_ROWS + row].
    void multiply(const WeightRows & weights, float * sums) const;

  private:
    struct alignas(CACHE_LINE) Line {
        char bytes[CACHE_LINE];
    };

    struct Expanded {
        const char *            packed = nullptr;
        std::unique_ptr<Line[]> memory;
    };

    const char * expanded(int column, const char * packed);

    const Dot &               dot;
    const int64_t             k;
    Columns                   columns = { nullptr, 0 };
    std::vector<Expanded>     copies;    // of columns, if the kernels read expanded ones
    std::vector<const char *> pointers;  // to these
};

#if QUANT_GEMM_KERNELS

// Whether NextRows, and with AVX-512 the kernel of IQ4_XS, prefetch weights into L1 and in the order of addresses; and whether
// panels are prefetched into L1. By default on AMD's family 1Ah (Zen 5, where memory is faster that way) and later ones (not
// measured). KIMI_PREFETCH_IN_ORDER=1 or 0 overrides that.
bool prefetches_in_order();

// The rows that are multiplied next, prefetched while as many others are multiplied: in the order of addresses, into L1, or
// the same bytes of each row as are multiplied, into L2.
class NextRows {
  public:
    // n: rows that are multiplied at once, or groups of `together` interleaved rows. size: of one of these, in bytes.
    NextRows(const WeightRows & weights, int n, size_t size, int together = 1) :
        first(weights.next), stride(together * weights.stride), n(n),
        in_order(stride == size && prefetches_in_order()) {}

    // To be called while `size` bytes of row r, beginning with byte `from`, are multiplied. The caller goes through all rows
    // before it goes on to later bytes; in the order of addresses, each call therefore continues where the one before
    // ended.
    inline __attribute__((always_inline)) void prefetch(int r, size_t from, size_t size) const {
        if (!in_order) {
            quant_gemm::prefetch<2>(first + r * stride + from, size);
            return;
        }
        const char * part = first + n * from + r * size;
        const char * line = (const char *) (((uintptr_t) part + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE);
        for (; line < part + size; line += CACHE_LINE) {
            __builtin_prefetch(line, 0, 3);
        }
    }

  private:
    const char * first;
    size_t       stride;
    int          n;
    bool         in_order;
};

// Prefetches the bytes one page after these n bytes into L1.
inline __attribute__((always_inline)) void prefetch_behind(const void * p, size_t n) {
    prefetch<3>((const char *) p + 4096, n);
}

#endif

}  // namespace quant_gemm
