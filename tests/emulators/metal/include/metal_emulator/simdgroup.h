#pragma once

// Barriers, and operations of a simdgroup of 32 lanes. All living lanes take part: a lane that is elsewhere is a fault.

#include "math.h"
#include "runtime.h"

namespace metal {

using metal_emulator::lane_index;
using metal_emulator::Place;

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

constexpr mem_flags operator|(mem_flags a, mem_flags b) {
    return mem_flags(int(a) | int(b));
}

inline void threadgroup_barrier(mem_flags flags, Place place = Place::here()) {
    metal_emulator::wait_for_threadgroup(int(flags) & int(mem_flags::mem_threadgroup),
                                         int(flags) & int(mem_flags::mem_device), place);
}

inline void simdgroup_barrier(mem_flags, Place place = Place::here()) {
    metal_emulator::meet_simdgroup(nullptr, [](void * const *, uint32_t) {}, "simdgroup_barrier", place);
}

// A lane's argument and result.
template <class T> struct Lane {
    T        value, result;
    unsigned from;
};

// COMPLETE(Lane<T> * const * lanes, uint32_t alive) sets the results.
template <class T, class COMPLETE> inline T exchange(T value, unsigned from, COMPLETE, const char * what, Place place) {
    Lane<T> mine{ value, value, from };
    metal_emulator::meet_simdgroup(
        &mine,
        [](void * const * lanes, uint32_t alive) { COMPLETE()(reinterpret_cast<Lane<T> * const *>(lanes), alive); },
        what, place);
    return mine.result;
}

// The operation over neighbouring lanes, then over neighbouring pairs, and so on.
template <class OPERATION> struct Reduction {
    template <class T> void operator()(Lane<T> * const * lanes, uint32_t alive) const {
        T        values[32];
        unsigned count = 0;
        for (unsigned i = 0; i < 32; i++) {
            if (alive >> i & 1) {
                values[count++] = lanes[i]->value;
            }
        }
        for (; count > 1; count = (count + 1) / 2) {
            for (unsigned i = 0; i + 1 < count; i += 2) {
                values[i / 2] = OPERATION()(values[i], values[i + 1]);
            }
            if (count % 2) {
                values[count / 2] = values[count - 1];
            }
        }
        for (unsigned i = 0; i < 32; i++) {
            if (alive >> i & 1) {
                lanes[i]->result = values[0];
            }
        }
    }
};

template <bool INCLUSIVE> struct Prefix {
    template <class T> void operator()(Lane<T> * const * lanes, uint32_t alive) const {
        T sum = T(0);
        for (unsigned i = 0; i < 32; i++) {
            if (alive >> i & 1) {
                const T before   = sum;
                sum              = T(sum + lanes[i]->value);
                lanes[i]->result = INCLUSIVE ? sum : before;
            }
        }
    }
};

// Lanes that do not exist give NaN.
struct Shuffle {
    template <class T> void operator()(Lane<T> * const * lanes, uint32_t alive) const {
        for (unsigned i = 0; i < 32; i++) {
            if (alive >> i & 1) {
                const unsigned from = lanes[i]->from;
                if (from < 32 && (alive >> from & 1)) {
                    lanes[i]->result = lanes[from]->value;
                } else {
                    memset(static_cast<void *>(&lanes[i]->result), 0xff, sizeof(T));
                }
            }
        }
    }
};

struct Add {
    template <class T> T operator()(T a, T b) const { return T(a + b); }
};

struct Larger {
    template <class T> T operator()(T a, T b) const { return max(a, b); }
};

struct Smaller {
    template <class T> T operator()(T a, T b) const { return min(a, b); }
};

template <class T> inline T simd_sum(T value, Place place = Place::here()) {
    return exchange(value, 0, Reduction<Add>(), "simd_sum", place);
}

template <class T> inline T simd_max(T value, Place place = Place::here()) {
    return exchange(value, 0, Reduction<Larger>(), "simd_max", place);
}

template <class T> inline T simd_min(T value, Place place = Place::here()) {
    return exchange(value, 0, Reduction<Smaller>(), "simd_min", place);
}

inline bool simd_any(bool value, Place place = Place::here()) {
    return exchange(value, 0, Reduction<Larger>(), "simd_any", place);
}

template <class T> inline T simd_prefix_inclusive_sum(T value, Place place = Place::here()) {
    return exchange(value, 0, Prefix<true>(), "simd_prefix_inclusive_sum", place);
}

template <class T> inline T simd_prefix_exclusive_sum(T value, Place place = Place::here()) {
    return exchange(value, 0, Prefix<false>(), "simd_prefix_exclusive_sum", place);
}

template <class T> inline T simd_shuffle(T value, ushort lane, Place place = Place::here()) {
    return exchange(value, lane, Shuffle(), "simd_shuffle", place);
}

template <class T> inline T simd_shuffle_xor(T value, ushort mask, Place place = Place::here()) {
    return exchange(value, lane_index() ^ mask, Shuffle(), "simd_shuffle_xor", place);
}

template <class T> inline T simd_shuffle_down(T value, ushort delta, Place place = Place::here()) {
    return exchange(value, lane_index() + delta, Shuffle(), "simd_shuffle_down", place);
}

template <class T> inline T simd_shuffle_up(T value, ushort delta, Place place = Place::here()) {
    return exchange(value, lane_index() - delta, Shuffle(), "simd_shuffle_up", place);
}

// An 8x8 matrix, two elements of one row in each lane.
template <class T, int ROWS, int COLUMNS> struct simdgroup_matrix {
    static_assert(ROWS == 8 && COLUMNS == 8, "Metal has simdgroup matrices of 8x8 only");

    using Element = T;

    T element[2];

    simdgroup_matrix() = default;

    explicit simdgroup_matrix(T diagonal) {
        const unsigned lane = lane_index();
        for (unsigned i = 0; i < 2; i++) {
            element[i] = row(lane) == column(lane) + i ? diagonal : T(0);
        }
    }

    static unsigned row(unsigned lane) { return (lane / 4 & 4) + lane / 2 % 4; }

    static unsigned column(unsigned lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
};

using simdgroup_float8x8  = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8   = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int ROWS, int COLUMNS = ROWS>
inline simdgroup_matrix<T, ROWS, COLUMNS> make_filled_simdgroup_matrix(T value) {
    simdgroup_matrix<T, ROWS, COLUMNS> result;
    result.element[0] = result.element[1] = value;
    return result;
}

template <class T> inline void check_lanes(uint32_t alive, T * const * lanes) {
    if (alive != ~0u) {
        metal_emulator::fail_kernel("a simdgroup matrix: not all 32 lanes are there",
                                    lanes[__builtin_ctz(alive)]->place);
    }
}

template <class M, class P> struct MatrixAccess {
    M *   matrix;
    P *   at;
    ulong stride;
    bool  transposed;
    Place place;

    P & element(unsigned lane, unsigned i) const {
        const unsigned row = M::row(lane), column = M::column(lane) + i;
        return transposed ? at[column * stride + row] : at[row * stride + column];
    }

    // The matrices of all lanes are one.
    static void check(MatrixAccess * const * lanes, uint32_t alive) {
        check_lanes(alive, lanes);
        for (unsigned i = 1; i < 32; i++) {
            if (lanes[i]->at != lanes[0]->at || lanes[i]->stride != lanes[0]->stride) {
                metal_emulator::fail_kernel("a simdgroup matrix: lanes have different addresses", lanes[0]->place);
            }
        }
    }
};

// STORE: to memory, otherwise from it.
template <bool STORE, class M, class P>
inline void
access_matrix(M & matrix, P * at, ulong stride, ulong2 origin, bool transposed, const char * what, Place place) {
    static_assert(std::is_same_v<typename M::Element, std::remove_cv_t<P>>,
                  "a simdgroup matrix: the memory has another type");
    using Access = MatrixAccess<M, P>;
    Access mine{ &matrix, at + (transposed ? origin.x * stride + origin.y : origin.y * stride + origin.x), stride,
                 transposed, place };
    metal_emulator::meet_simdgroup(
        &mine,
        [](void * const * all, uint32_t alive) {
            Access * const * lanes = reinterpret_cast<Access * const *>(all);
            Access::check(lanes, alive);
            for (unsigned lane = 0; lane < 32; lane++) {
                for (unsigned i = 0; i < 2; i++) {
                    if constexpr (STORE) {
                        lanes[lane]->element(lane, i) = lanes[lane]->matrix->element[i];
                    } else {
                        lanes[lane]->matrix->element[i] = lanes[lane]->element(lane, i);
                    }
                }
            }
        },
        what, place);
}

template <class T, class P>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8> & matrix,
                           const P *                   at,
                           ulong                       stride     = 8,
                           ulong2                      origin     = 0,
                           bool                        transposed = false,
                           Place                       place      = Place::here()) {
    access_matrix<false>(matrix, at, stride, origin, transposed, "simdgroup_load", place);
}

template <class T, class P>
inline void simdgroup_store(const simdgroup_matrix<T, 8, 8> & matrix,
                            P *                               at,
                            ulong                             stride     = 8,
                            ulong2                            origin     = 0,
                            bool                              transposed = false,
                            Place                             place      = Place::here()) {
    access_matrix<true>(matrix, at, stride, origin, transposed, "simdgroup_store", place);
}

template <class D, class A, class B, class C> struct MatrixProduct {
    simdgroup_matrix<D, 8, 8> *       d;
    const simdgroup_matrix<A, 8, 8> * a;
    const simdgroup_matrix<B, 8, 8> * b;
    const simdgroup_matrix<C, 8, 8> * c;
    Place                             place;

    // Sums in float, from the first product to the last.
    static void complete(void * const * all, uint32_t alive) {
        MatrixProduct * const * lanes = reinterpret_cast<MatrixProduct * const *>(all);
        check_lanes(alive, lanes);
        using Layout = simdgroup_matrix<D, 8, 8>;
        float left[8][8], right[8][8], sum[8][8];
        for (unsigned lane = 0; lane < 32; lane++) {
            for (unsigned i = 0; i < 2; i++) {
                const unsigned row = Layout::row(lane), column = Layout::column(lane) + i;
                left[row][column]  = float(lanes[lane]->a->element[i]);
                right[row][column] = float(lanes[lane]->b->element[i]);
                sum[row][column]   = lanes[lane]->c ? float(lanes[lane]->c->element[i]) : 0.0f;
            }
        }
        for (unsigned row = 0; row < 8; row++) {
            for (unsigned k = 0; k < 8; k++) {
                for (unsigned column = 0; column < 8; column++) {
                    sum[row][column] += left[row][k] * right[k][column];
                }
            }
        }
        for (unsigned lane = 0; lane < 32; lane++) {
            for (unsigned i = 0; i < 2; i++) {
                lanes[lane]->d->element[i] = D(sum[Layout::row(lane)][Layout::column(lane) + i]);
            }
        }
    }
};

// d = a*b + c
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8> &       d,
                                          const simdgroup_matrix<A, 8, 8> & a,
                                          const simdgroup_matrix<B, 8, 8> & b,
                                          const simdgroup_matrix<C, 8, 8> & c,
                                          Place                             place = Place::here()) {
    MatrixProduct<D, A, B, C> mine{ &d, &a, &b, &c, place };
    metal_emulator::meet_simdgroup(&mine, mine.complete, "simdgroup_multiply_accumulate", place);
}

template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D, 8, 8> &       d,
                               const simdgroup_matrix<A, 8, 8> & a,
                               const simdgroup_matrix<B, 8, 8> & b,
                               Place                             place = Place::here()) {
    MatrixProduct<D, A, B, D> mine{ &d, &a, &b, nullptr, place };
    metal_emulator::meet_simdgroup(&mine, mine.complete, "simdgroup_multiply", place);
}

}  // namespace metal
