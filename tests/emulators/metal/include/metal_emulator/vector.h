#pragma once

// Scalars, vectors and matrices of the Metal Shading Language. As there, vectors of different element types are never
// converted implicitly.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

using uchar  = unsigned char;
using ushort = unsigned short;
using uint   = unsigned int;
using ulong  = unsigned long;
using half   = _Float16;

constexpr half operator""h(long double value) {
    return half(value);
}

constexpr half operator""h(unsigned long long value) {
    return half(value);
}

// 16 bits, computed in float and rounded to nearest even after each operation.
struct bfloat {
    uint16_t bits;

    bfloat() = default;

    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T> || std::is_same_v<T, half>>>
    bfloat(T value) : bits(round(float(value))) {}

    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float          value;
        memcpy(&value, &wide, sizeof(value));
        return value;
    }

    bfloat & operator+=(float other) { return *this = bfloat(float(*this) + other); }

    bfloat & operator-=(float other) { return *this = bfloat(float(*this) - other); }

    bfloat & operator*=(float other) { return *this = bfloat(float(*this) * other); }

    bfloat & operator/=(float other) { return *this = bfloat(float(*this) / other); }

  private:
    static uint16_t round(float value) {
        uint32_t wide;
        memcpy(&wide, &value, sizeof(wide));
        if ((wide & 0x7fffffff) > 0x7f800000) {
            return 0x7fff;
        }
        return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    }
};

inline bfloat operator+(bfloat a, bfloat b) {
    return a += b;
}

inline bfloat operator-(bfloat a, bfloat b) {
    return a -= b;
}

inline bfloat operator*(bfloat a, bfloat b) {
    return a *= b;
}

inline bfloat operator/(bfloat a, bfloat b) {
    return a /= b;
}

inline float operator*(bfloat a, float b) {
    return float(a) * b;
}

namespace metal {

template <class T>
constexpr bool is_scalar_v =
    std::is_arithmetic_v<T> || std::is_enum_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;
template <class T> using if_scalar = std::enable_if_t<is_scalar_v<T>, int>;

template <class T, int N> struct Elements;

template <class T> struct Elements<T, 2> {
    union {
        struct {
            T x, y;
        };

        T element[2];
    };
};

template <class T> struct Elements<T, 3> {
    union {
        struct {
            T x, y, z;
        };

        T element[3];
    };

    T unused;  // as large as a vector of 4
};

template <class T> struct Elements<T, 4> {
    union {
        struct {
            T x, y, z, w;
        };

        T element[4];
    };
};

template <class T, int N> struct vec;

template <int... I> constexpr bool all_different() {
    unsigned seen = 0;
    ((seen |= 1u << I), ...);
    return __builtin_popcount(seen) == sizeof...(I);
}

// Components of a vector that are assigned to.
template <class T, int... I> struct Target {
    using Value = vec<T, sizeof...(I)>;

    T * element;

    void operator=(const Value & value) {
        const int component[] = { I... };
        for (size_t i = 0; i < sizeof...(I); i++) {
            element[component[i]] = value.element[i];
        }
    }

    void operator+=(const Value & other) { *this = value() + other; }

    void operator-=(const Value & other) { *this = value() - other; }

    void operator*=(const Value & other) { *this = value() * other; }

    void operator/=(const Value & other) { *this = value() / other; }

  private:
    Value value() const { return { element[I]... }; }
};

// In files that are not checked for alignment (build.py) the compiler must not assume it either.
#ifdef METAL_EMULATOR_ANY_ADDRESS
template <class T, int N> constexpr size_t vec_alignment = alignof(T);
#else
template <class T, int N> constexpr size_t vec_alignment = (N == 3 ? 4 : N) * sizeof(T);
#endif

template <class T, int N> struct alignas(vec_alignment<T, N>) vec : Elements<T, N> {
    vec() = default;

    template <class S, if_scalar<S> = 0> vec(S value) {
        for (int i = 0; i < N; i++) {
            this->element[i] = T(value);
        }
    }

    template <class U, std::enable_if_t<!std::is_same_v<U, T>, int> = 0> explicit vec(const vec<U, N> & other) {
        for (int i = 0; i < N; i++) {
            this->element[i] = T(other.element[i]);
        }
    }

    template <class A, class B, class... More> vec(const A & first, const B & second, const More &... more) {
        int at = 0;
        append(at, first);
        append(at, second);
        (append(at, more), ...);
    }

    T & operator[](size_t i) { return this->element[i]; }

    const T & operator[](size_t i) const { return this->element[i]; }

    // v.xy
    template <int... I> const vec<T, sizeof...(I)> part() const {
        static_assert(((I < N) && ...), "the vector has fewer components");
        return { this->element[I]... };
    }

    // v.xy = …
    template <int... I> Target<T, I...> target() {
        static_assert(((I < N) && ...), "the vector has fewer components");
        static_assert(all_different<I...>(), "a component is assigned to twice");
        return { this->element };
    }

  private:
    template <class S, if_scalar<S> = 0> void append(int & at, S value) { this->element[at++] = T(value); }

    template <int M> void append(int & at, const vec<T, M> & part) {
        for (int i = 0; i < M; i++) {
            this->element[at++] = part.element[i];
        }
    }
};

template <class T, int N, class F> auto each(const vec<T, N> & a, F function) {
    vec<decltype(function(a.element[0])), N> result;
    for (int i = 0; i < N; i++) {
        result.element[i] = function(a.element[i]);
    }
    return result;
}

template <class T, int N, class F> auto each(const vec<T, N> & a, const vec<T, N> & b, F function) {
    vec<decltype(function(a.element[0], b.element[0])), N> result;
    for (int i = 0; i < N; i++) {
        result.element[i] = function(a.element[i], b.element[i]);
    }
    return result;
}

#define METAL_EMULATOR_OPERATOR(OP, RESULT)                                                                            \
    template <class T, int N> inline vec<RESULT, N> operator OP(const vec<T, N> & a, const vec<T, N> & b) {            \
        return each(a, b, [](T x, T y) { return RESULT(x OP y); });                                                    \
    }                                                                                                                  \
    template <class T, int N, class S, if_scalar<S> = 0> inline vec<RESULT, N> operator OP(const vec<T, N> & a, S b) { \
        return a OP vec<T, N>(b);                                                                                      \
    }                                                                                                                  \
    template <class T, int N, class S, if_scalar<S> = 0> inline vec<RESULT, N> operator OP(S a, const vec<T, N> & b) { \
        return vec<T, N>(a) OP b;                                                                                      \
    }
#define METAL_EMULATOR_COMPOUND(OP)                                                                                    \
    METAL_EMULATOR_OPERATOR(OP, T)                                                                                     \
    template <class T, int N, class B> inline vec<T, N> & operator OP## = (vec<T, N> & a, const B & b) {               \
        return a = a OP b;                                                                                             \
    }

METAL_EMULATOR_COMPOUND(+)
METAL_EMULATOR_COMPOUND(-)
METAL_EMULATOR_COMPOUND(*)
METAL_EMULATOR_COMPOUND(/)
METAL_EMULATOR_COMPOUND(%)
METAL_EMULATOR_COMPOUND(&)
METAL_EMULATOR_COMPOUND(|)
METAL_EMULATOR_COMPOUND(^)
METAL_EMULATOR_COMPOUND(<<)
METAL_EMULATOR_COMPOUND(>>)
METAL_EMULATOR_OPERATOR(==, bool)
METAL_EMULATOR_OPERATOR(!=, bool)
METAL_EMULATOR_OPERATOR(<, bool)
METAL_EMULATOR_OPERATOR(>, bool)
METAL_EMULATOR_OPERATOR(<=, bool)
METAL_EMULATOR_OPERATOR(>=, bool)
METAL_EMULATOR_OPERATOR(&&, bool)
METAL_EMULATOR_OPERATOR(||, bool)
#undef METAL_EMULATOR_COMPOUND
#undef METAL_EMULATOR_OPERATOR

template <class T, int N> inline vec<T, N> operator-(const vec<T, N> & a) {
    return each(a, [](T x) { return T(-x); });
}

template <class T, int N> inline vec<T, N> operator~(const vec<T, N> & a) {
    return each(a, [](T x) { return T(~x); });
}

template <int N> inline vec<bool, N> operator!(const vec<bool, N> & a) {
    return each(a, [](bool x) { return !x; });
}

// Elements without padding, aligned as one of them.
template <class T, int N> struct packed_vec {
    T element[N];

    packed_vec() = default;

    // loops, because the compiler does not insert the device's checks for memcpy
    packed_vec(const vec<T, N> & other) {
        for (int i = 0; i < N; i++) {
            element[i] = other.element[i];
        }
    }

    operator vec<T, N>() const {
        vec<T, N> result;
        for (int i = 0; i < N; i++) {
            result.element[i] = element[i];
        }
        return result;
    }

    template <class U, std::enable_if_t<!std::is_same_v<U, T>, int> = 0> explicit operator vec<U, N>() const {
        return vec<U, N>(vec<T, N>(*this));
    }

    T & operator[](size_t i) { return element[i]; }

    const T & operator[](size_t i) const { return element[i]; }
};

// C columns of R rows.
template <class T, int C, int R> struct matrix {
    vec<T, R> column[C];

    matrix() = default;

    explicit matrix(T diagonal) {
        for (int i = 0; i < C; i++) {
            column[i]    = vec<T, R>(T(0));
            column[i][i] = diagonal;
        }
    }

    template <class... V, std::enable_if_t<sizeof...(V) == C && (std::is_convertible_v<V, vec<T, R>> && ...), int> = 0>
    explicit matrix(const V &... columns) : column{ columns... } {}

    template <class U, std::enable_if_t<!std::is_same_v<U, T>, int> = 0>
    explicit matrix(const matrix<U, C, R> & other) {
        for (int i = 0; i < C; i++) {
            column[i] = vec<T, R>(other.column[i]);
        }
    }

    vec<T, R> & operator[](size_t i) { return column[i]; }

    const vec<T, R> & operator[](size_t i) const { return column[i]; }
};

template <class T, int C, int R, class S, if_scalar<S> = 0> matrix<T, C, R> operator*(matrix<T, C, R> a, S b) {
    for (int i = 0; i < C; i++) {
        a.column[i] *= b;
    }
    return a;
}

template <class T, int C, int R> matrix<T, C, R> operator+(matrix<T, C, R> a, const matrix<T, C, R> & b) {
    for (int i = 0; i < C; i++) {
        a.column[i] += b.column[i];
    }
    return a;
}

}  // namespace metal

#define METAL_EMULATOR_VECTORS(T)                                                                                      \
    using T##2          = metal::vec<T, 2>;                                                                            \
    using T##3          = metal::vec<T, 3>;                                                                            \
    using T##4          = metal::vec<T, 4>;                                                                            \
    using packed_##T##2 = metal::packed_vec<T, 2>;                                                                     \
    using packed_##T##3 = metal::packed_vec<T, 3>;                                                                     \
    using packed_##T##4 = metal::packed_vec<T, 4>;
#define METAL_EMULATOR_MATRICES(T)                                                                                     \
    using T##2x2 = metal::matrix<T, 2, 2>;                                                                             \
    using T##2x4 = metal::matrix<T, 2, 4>;                                                                             \
    using T##3x3 = metal::matrix<T, 3, 3>;                                                                             \
    using T##4x4 = metal::matrix<T, 4, 4>;

METAL_EMULATOR_VECTORS(float)
METAL_EMULATOR_VECTORS(half)
METAL_EMULATOR_VECTORS(bfloat)
METAL_EMULATOR_VECTORS(char)
METAL_EMULATOR_VECTORS(uchar)
METAL_EMULATOR_VECTORS(short)
METAL_EMULATOR_VECTORS(ushort)
METAL_EMULATOR_VECTORS(int)
METAL_EMULATOR_VECTORS(uint)
METAL_EMULATOR_VECTORS(long)
METAL_EMULATOR_VECTORS(ulong)
METAL_EMULATOR_VECTORS(bool)
METAL_EMULATOR_MATRICES(float)
METAL_EMULATOR_MATRICES(half)
#undef METAL_EMULATOR_VECTORS
#undef METAL_EMULATOR_MATRICES
