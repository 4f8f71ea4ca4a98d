#pragma once

// Tensor cores: mma.sync, ldmatrix, stmatrix, movmatrix, with the fragment layouts of the PTX ISA ("Matrix Fragments
// for mma…", "ldmatrix"). A warp of 32 lanes, in groups of 4, holds matrices in 32-bit registers of E elements each
// (E = 1: tf32, 2: f16 and bf16, 4: s8). With g = lane / 4, t = lane % 4, register r, element i of it:
//
//   A (16 x K)   row g + 8 (r % 2), column t E + i + 4 E (r / 2)     2 K / (4 E) registers
//   B (K x 8)    row t E + i + 4 E r, column g                       K / (4 E)
//   C, D (16x8)  row g + 8 (r / 2), column 2 t + r % 2               4, one element each
//   C, D of f16  row g + 8 r, column 2 t + i                         2, two elements each
//
// Sums: products are exact; like an A100, the emulator adds them to the sum in blocks of 8 (tf32: 4) and truncates the
// result to float (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores, 2021). The further loss
// of an A100, bits shifted out if the terms of a block differ by more than 2^24, is not modelled.

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
template <class FORMAT> struct Sixteen {
    using Sum                  = float;
    static constexpr int E     = 2;
    static constexpr int BLOCK = 8;
    static float         element(uint32_t bits, int i) { return FORMAT::widen(uint16_t(bits >> 16 * i)); }
};

using F16  = Sixteen<HalfFormat>;
using BF16 = Sixteen<BfloatFormat>;

// The low 13 bits of a register are ignored.
struct TF32 {
    using Sum                  = float;
    static constexpr int E     = 1;
    static constexpr int BLOCK = 4;
    static float         element(uint32_t bits, int) { return bits_as<float>(bits & 0xffffe000); }
};

struct S8 {
    using Sum                  = int32_t;
    static constexpr int E     = 4;
    static constexpr int BLOCK = 16;
    static int           element(uint32_t bits, int i) { return int8_t(bits >> 8 * i); }
};

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

template <class T, int K> struct Product {
    static constexpr int A = 2 * K / (4 * T::E), B = K / (4 * T::E);
    static_assert(A > 0 && B > 0, "no such shape");

    uint32_t        a[A], b[B];
    typename T::Sum sum[4];
};

template <class T, int K> void multiply(Product<T, K> * const * lanes, uint32_t) {
    using Sum            = typename T::Sum;
    constexpr bool EXACT = std::is_same_v<Sum, int32_t>;
    using Row            = std::conditional_t<EXACT, Ints, Doubles>;
    using Element        = std::conditional_t<EXACT, int32_t, double>;
    constexpr int E      = T::E;
    Element       a[16][K];
    Row           b[K];
    for (int lane = 0; lane < 32; lane++) {
        const int g = lane / 4, t = lane % 4;
        for (int r = 0; r < Product<T, K>::A; r++) {
            for (int i = 0; i < E; i++) {
                a[g + 8 * (r % 2)][t * E + i + 4 * E * (r / 2)] = T::element(lanes[lane]->a[r], i);
            }
        }
        for (int r = 0; r < Product<T, K>::B; r++) {
            for (int i = 0; i < E; i++) {
                b[t * E + i + 4 * E * r][g] = T::element(lanes[lane]->b[r], i);
            }
        }
    }
    for (int row = 0; row < 16; row++) {
        Row sum;
        for (int column = 0; column < 8; column++) {
            sum[column] = lanes[row % 8 * 4 + column / 2]->sum[row / 8 * 2 + column % 2];
        }
        for (int first = 0; first < K; first += T::BLOCK) {
            for (int k = first; k < first + T::BLOCK; k++) {
                sum += a[row][k] * b[k];
            }
            if constexpr (!EXACT) {
                sum = cut_off(sum);
            }
        }
        for (int column = 0; column < 8; column++) {
            lanes[row % 8 * 4 + column / 2]->sum[row / 8 * 2 + column % 2] = Sum(sum[column]);
        }
    }
}

inline void require_whole_warp(const char * what, Place place) {
    const Warp & warp = *block.current->warp;
    if (~warp.alive) {
        fail(format("%s: only the lanes 0x%08x of the warp are there; all 32 must take part", what, warp.alive), place);
    }
}

// D = A B + C for T and K; the register type of the sum is T::Sum.
template <class T, int K>
void mma(Place place, Out<4> d, const In<Product<T, K>::A> & a, const In<Product<T, K>::B> & b, const In<4> & c) {
    require_whole_warp("mma.sync", place);
    Product<T, K> mine;
    memcpy(mine.a, a.bits, sizeof(mine.a));
    memcpy(mine.b, b.bits, sizeof(mine.b));
    memcpy(mine.sum, c.bits, sizeof(mine.sum));
    meet<Product<T, K>, multiply<T, K>>(~0u, mine, "mma.sync", place);
    put(d, bits_as<In<4>>(mine.sum).bits);
}

// The same with C and D of f16.
template <int K>
void mma_f16(
    Place place, Out<2> d, const In<Product<F16, K>::A> & a, const In<Product<F16, K>::B> & b, const In<2> & c) {
    float sum[4];
    for (int i = 0; i < 4; i++) {
        sum[i] = F16::element(c.bits[i / 2], i % 2);
    }
    mma<F16, K>(place, out(sum[0], sum[1], sum[2], sum[3]), a, b, in(sum[0], sum[1], sum[2], sum[3]));
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
template <int MATRICES, bool TRANSPOSED, bool STORE>
CUDA_EMULATOR_UNSEEN void move_matrices(MatrixRows * const * lanes, uint32_t) {
    for (int lane = 0; lane < 32; lane++) {
        for (int m = 0; m < MATRICES; m++) {
            uint16_t elements[2];
            memcpy(elements, &lanes[lane]->registers[m], 4);
            for (int i = 0; i < 2; i++) {
                const int row    = TRANSPOSED ? lane % 4 * 2 + i : lane / 4;
                const int column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
                char *    at     = lanes[8 * m + row]->row + 2 * column;
                if constexpr (STORE) {
                    memcpy(at, &elements[i], 2);
                } else {
                    memcpy(&elements[i], at, 2);
                }
                lanes[lane]->elements[m][i] = at;
            }
            memcpy(&lanes[lane]->registers[m], elements, 4);
        }
    }
}

template <int N, bool TRANSPOSED, bool STORE> void move_with_warp(MatrixRows & mine, const char * what, Place place) {
    require_whole_warp(what, place);
    if (block.current->lane < 8 * N) {
        check_row(mine.row, what, place);
    }
    meet<MatrixRows, move_matrices<N, TRANSPOSED, STORE>>(~0u, mine, what, place);
    for (int m = 0; m < N; m++) {
        for (const char * element : mine.elements[m]) {
            see_access(element, 2, STORE, place);
        }
    }
}

template <bool TRANSPOSED, int N, class T> void ldmatrix(Place place, Out<N> to, T address) {
    MatrixRows mine{ shared_pointer(address), {} };
    move_with_warp<N, TRANSPOSED, false>(mine, "ldmatrix", place);
    put(to, mine.registers);
}

template <bool TRANSPOSED, int N, class T> void stmatrix(Place place, T address, const In<N> & from) {
    MatrixRows mine{ shared_pointer(address), {} };
    memcpy(mine.registers, from.bits, sizeof(from.bits));
    move_with_warp<N, TRANSPOSED, true>(mine, "stmatrix", place);
}

struct Transposed {
    uint32_t from, to;
};

inline void transpose(Transposed * const * lanes, uint32_t) {
    for (int lane = 0; lane < 32; lane++) {
        uint32_t to = 0;
        for (int i = 0; i < 2; i++) {
            const int row = lane % 4 * 2 + i, column = lane / 4;
            to |= (lanes[4 * row + column / 2]->from >> 16 * (column % 2) & 0xffff) << 16 * i;
        }
        lanes[lane]->to = to;
    }
}

inline void movmatrix(Place place, Out<1> to, const In<1> & from) {
    require_whole_warp("movmatrix", place);
    Transposed mine{ from.bits[0], 0 };
    meet<Transposed, transpose>(~0u, mine, "movmatrix", place);
    put(to, &mine.to);
}

}  // namespace cuda_emulator
