#pragma once

// Tensor cores: mma.sync m16n8k16 and ldmatrix, with the fragment layouts of the PTX ISA ("Matrix Fragments for
// mma.m16n8k16 with floating point type", "ldmatrix"). A warp of 32 lanes, in groups of 4, holds matrices in 32-bit
// registers of two elements each. With g = lane / 4, t = lane % 4, register r, element i of it:
//
//   A (16x16)    row g + 8 (r % 2), column 2 t + i + 8 (r / 2)     4 registers
//   B (16x8)     row 2 t + i + 8 r, column g                       2
//   C, D (16x8)  row g + 8 (r / 2), column 2 t + r % 2             4, one float each
//   C, D of f16  row g + 8 r, column 2 t + i                       2
//
// Sums: products are exact; like an A100, the emulator adds them to the sum in blocks of 8 and truncates the result to
// float (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, 2021). The further loss of an A100,
// bits shifted out if the terms of a block differ by more than 2^24, is not modelled.

#include "block.h"
#include "half.h"
#include "races.h"
#include "shared.h"

namespace cuda_emulator {

// Registers of one operand: Out for results, In for inputs. A register may be of any 32-bit type.
template <int N> struct Out {
    void * at[N];
};

template <int N> struct In {
    uint32_t bits[N];
};

template <class... T> Out<sizeof...(T)> out(T &... registers) {
    static_assert(((sizeof(T) == 4) && ...), "these registers have 32 bits");
    return { { static_cast<void *>(&registers)... } };
}

template <class... T> In<sizeof...(T)> in(const T &... registers) {
    static_assert(((sizeof(T) == 4) && ...), "these registers have 32 bits");
    return { { bits_as<uint32_t>(registers)... } };
}

template <int N> void put(const Out<N> & to, const uint32_t * bits) {
    for (int i = 0; i < N; i++) {
        memcpy(to.at[i], &bits[i], 4);
    }
}

// Element i of a register, as a number.
template <class FORMAT> float element(uint32_t bits, int i) {
    return FORMAT::widen(uint16_t(bits >> 16 * i));
}

// A row of 8 sums, exact until truncated.
using Doubles = double __attribute__((vector_size(64)));
using Longs   = int64_t __attribute__((vector_size(64)));
using Floats  = float __attribute__((vector_size(32)));
using Ints    = int32_t __attribute__((vector_size(32)));

// Rounds to float toward zero, as a tensor core does when adding.
inline Doubles cut_off(Doubles sums) {
    const Floats nearest = __builtin_convertvector(sums, Floats);
    const Longs  size    = (Longs) sums & INT64_MAX;
    const Longs  rounded = (Longs) __builtin_convertvector(nearest, Doubles) & INT64_MAX;
    const Longs  beyond  = (Doubles) rounded > (Doubles) size;  // -1 if it is
    return __builtin_convertvector((Floats) ((Ints) nearest + __builtin_convertvector(beyond, Ints)), Doubles);
}

struct Product {
    uint32_t a[4], b[2];
    float    sum[4];
};

template <class FORMAT> void multiply(Product * const * lanes, uint32_t) {
    constexpr int K = 16, BLOCK = 8;
    double        a[16][K];
    Doubles       b[K];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 2; i++) {
            for (int r = 0; r < 4; r++) {
                a[g + 8 * (r % 2)][2 * t + i + 8 * (r / 2)] = element<FORMAT>(lanes[lane]->a[r], i);
            }
            for (int r = 0; r < 2; r++) {
                b[2 * t + i + 8 * r][g] = element<FORMAT>(lanes[lane]->b[r], i);
            }
        }
    }
    for (int row = 0; row < 16; row++) {
        Doubles sum;
        for (int column = 0; column < 8; column++) {
            sum[column] = lanes[row % 8 * 4 + column / 2]->sum[row / 8 * 2 + column % 2];
        }
        for (int first = 0; first < K; first += BLOCK) {
            for (int k = first; k < first + BLOCK; k++) {
                sum += a[row][k] * b[k];
            }
            sum = cut_off(sum);
        }
        for (int column = 0; column < 8; column++) {
            lanes[row % 8 * 4 + column / 2]->sum[row / 8 * 2 + column % 2] = float(sum[column]);
        }
    }
}

inline void require_whole_warp(const char * what, Place place) {
    const Warp & warp = *block.current->warp;
    if (~warp.alive) {
        fail(format("%s: only the lanes 0x%08x of the warp are there; all 32 must take part", what, warp.alive), place);
    }
}

// D = A B + C.
template <class FORMAT> void mma(Place place, Out<4> d, const In<4> & a, const In<2> & b, const In<4> & c) {
    require_whole_warp("mma.sync", place);
    Product mine;
    memcpy(mine.a, a.bits, sizeof(mine.a));
    memcpy(mine.b, b.bits, sizeof(mine.b));
    memcpy(mine.sum, c.bits, sizeof(mine.sum));
    meet<Product, multiply<FORMAT>>(~0u, mine, "mma.sync", place);
    put(d, bits_as<In<4>>(mine.sum).bits);
}

// The same with C and D of f16.
inline void mma_f16(Place place, Out<2> d, const In<4> & a, const In<2> & b, const In<2> & c) {
    float sum[4];
    for (int i = 0; i < 4; i++) {
        sum[i] = element<HalfFormat>(c.bits[i / 2], i % 2);
    }
    mma<HalfFormat>(place, out(sum[0], sum[1], sum[2], sum[3]), a, b, in(sum[0], sum[1], sum[2], sum[3]));
    uint32_t sums[2] = {};
    for (int i = 0; i < 4; i++) {
        sums[i / 2] |= uint32_t(HalfFormat::round(sum[i])) << 16 * (i % 2);
    }
    put(d, sums);
}

// A shared pointer from an operand: a 32-bit shared address or a pointer.
template <class T> char * shared_pointer(T operand) {
    if constexpr (std::is_pointer_v<T>) {
        return (char *) operand;  // const or not
    } else {
        char * const whole = reinterpret_cast<char *>(uintptr_t(operand));
        return shared_arena.contains(whole) ? whole : shared_arena.begin() + size_t(operand);
    }
}

// Rows of 8 elements of 16 bits: lane 8 m + r passes the address of row r of matrix m.
struct MatrixRows {
    char *   row;
    uint32_t registers[4];
    char *   elements[4][2] = {};  // addresses of this lane's elements
};

inline void check_row(const char * row, const char * what, Place place) {
    if (!shared_arena.contains(row)) {
        fail(format("%s: the address %p is not in shared memory", what, static_cast<const void *>(row)), place);
    }
    if (uintptr_t(row) % 16) {
        fail(format("%s: the address of a row is not aligned to 16 bytes", what), place);
    }
}

// Lane l holds the elements (row l / 4, columns 2 (l % 4) + {0, 1}) of matrix m; transposed, row and column are
// swapped.
template <int MATRICES, bool TRANSPOSED> CUDA_EMULATOR_UNSEEN void load_matrices(MatrixRows * const * lanes, uint32_t) {
    for (int lane = 0; lane < 32; lane++) {
        for (int m = 0; m < MATRICES; m++) {
            uint16_t elements[2];
            for (int i = 0; i < 2; i++) {
                const int row    = TRANSPOSED ? lane % 4 * 2 + i : lane / 4;
                const int column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
                char *    at     = lanes[8 * m + row]->row + 2 * column;
                memcpy(&elements[i], at, 2);
                lanes[lane]->elements[m][i] = at;
            }
            memcpy(&lanes[lane]->registers[m], elements, 4);
        }
    }
}

template <bool TRANSPOSED, int N, class T> void ldmatrix(Place place, Out<N> to, T address) {
    MatrixRows mine{ shared_pointer(address), {} };
    require_whole_warp("ldmatrix", place);
    if (block.current->lane < 8 * N) {
        check_row(mine.row, "ldmatrix", place);
    }
    meet<MatrixRows, load_matrices<N, TRANSPOSED>>(~0u, mine, "ldmatrix", place);
    for (int m = 0; m < N; m++) {
        for (const char * element : mine.elements[m]) {
            see_access(element, 2, false, place);
        }
    }
    put(to, mine.registers);
}

}  // namespace cuda_emulator
