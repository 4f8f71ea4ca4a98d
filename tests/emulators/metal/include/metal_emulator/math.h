#pragma once

// Functions of the Metal standard library. Functions of half and bfloat are computed in float.

#include "vector.h"

#include <cfloat>
#include <cmath>

namespace metal {

using std::conditional;
using std::enable_if;
using std::is_same;
using std::is_same_v;

template <class T, class U> inline T as_type(const U & from) {
    static_assert(sizeof(T) == sizeof(U), "as_type between types of different sizes");
    T to;
    memcpy(static_cast<void *>(&to), &from, sizeof(to));
    return to;
}

// A scalar function of float for float, half, bfloat, and vectors of them.
#define METAL_EMULATOR_FUNCTION(NAME, EXPRESSION)                                                                      \
    inline float NAME(float x) {                                                                                       \
        return EXPRESSION;                                                                                             \
    }                                                                                                                  \
    inline half NAME(half narrow) {                                                                                    \
        const float x = narrow;                                                                                        \
        return half(EXPRESSION);                                                                                       \
    }                                                                                                                  \
    inline bfloat NAME(bfloat narrow) {                                                                                \
        const float x = narrow;                                                                                        \
        return bfloat(EXPRESSION);                                                                                     \
    }                                                                                                                  \
    template <class T, int N> inline vec<T, N> NAME(const vec<T, N> & a) {                                             \
        return each(a, [](T x) { return NAME(x); });                                                                   \
    }

METAL_EMULATOR_FUNCTION(exp, ::expf(x))
METAL_EMULATOR_FUNCTION(exp2, ::exp2f(x))
METAL_EMULATOR_FUNCTION(exp10, ::expf(x * 2.30258509299404568402f))
METAL_EMULATOR_FUNCTION(log, ::logf(x))
METAL_EMULATOR_FUNCTION(log2, ::log2f(x))
METAL_EMULATOR_FUNCTION(log10, ::log10f(x))
METAL_EMULATOR_FUNCTION(sqrt, ::sqrtf(x))
METAL_EMULATOR_FUNCTION(rsqrt, 1.0f / ::sqrtf(x))
METAL_EMULATOR_FUNCTION(fabs, ::fabsf(x))
METAL_EMULATOR_FUNCTION(sin, ::sinf(x))
METAL_EMULATOR_FUNCTION(cos, ::cosf(x))
METAL_EMULATOR_FUNCTION(tan, ::tanf(x))
METAL_EMULATOR_FUNCTION(tanh, ::tanhf(x))
METAL_EMULATOR_FUNCTION(floor, ::floorf(x))
METAL_EMULATOR_FUNCTION(ceil, ::ceilf(x))
METAL_EMULATOR_FUNCTION(trunc, ::truncf(x))
METAL_EMULATOR_FUNCTION(round, ::roundf(x))
METAL_EMULATOR_FUNCTION(rint, ::rintf(x))
METAL_EMULATOR_FUNCTION(sign, float((x > 0) - (x < 0)))
#undef METAL_EMULATOR_FUNCTION

namespace precise {
using metal::cos;
using metal::exp;
using metal::log;
using metal::sin;
using metal::sqrt;
using metal::tanh;
}  // namespace precise

namespace fast {
using namespace precise;
}

// The type of a function of two scalars: that of both, or the one to which C++ converts them.
template <class A, class B> struct common {
    using type = decltype(A() + B());
};

template <class A> struct common<A, A> {
    using type = A;
};

template <class A, class B> using common_t = typename common<A, B>::type;

#define METAL_EMULATOR_PAIR(NAME, EXPRESSION)                                                                          \
    template <class A, class B, if_scalar<A> = 0, if_scalar<B> = 0> inline common_t<A, B> NAME(A a, B b) {             \
        const common_t<A, B> x = a, y = b;                                                                             \
        return EXPRESSION;                                                                                             \
    }                                                                                                                  \
    template <class T, int N> inline vec<T, N> NAME(const vec<T, N> & a, const vec<T, N> & b) {                        \
        return each(a, b, [](T x, T y) { return NAME(x, y); });                                                        \
    }                                                                                                                  \
    template <class T, int N, class S, if_scalar<S> = 0> inline vec<T, N> NAME(const vec<T, N> & a, S b) {             \
        return NAME(a, vec<T, N>(b));                                                                                  \
    }                                                                                                                  \
    template <class T, int N, class S, if_scalar<S> = 0> inline vec<T, N> NAME(S a, const vec<T, N> & b) {             \
        return NAME(vec<T, N>(a), b);                                                                                  \
    }

METAL_EMULATOR_PAIR(max, x < y ? y : x)
METAL_EMULATOR_PAIR(min, y < x ? y : x)
METAL_EMULATOR_PAIR(fmax, (x < y || x != x) ? y : x)
METAL_EMULATOR_PAIR(fmin, (y < x || x != x) ? y : x)
#undef METAL_EMULATOR_PAIR

template <class T, if_scalar<T> = 0> inline T abs(T x) {
    return x < T(0) ? T(-x) : x;
}

inline float pow(float x, float y) {
    return ::powf(x, y);
}

inline float fma(float a, float b, float c) {
    return ::fmaf(a, b, c);
}

inline float fmod(float x, float y) {
    return ::fmodf(x, y);
}

template <class T, int N> inline vec<T, N> fma(const vec<T, N> & a, const vec<T, N> & b, const vec<T, N> & c) {
    vec<T, N> result;
    for (int i = 0; i < N; i++) {
        result[i] = T(::fmaf(a[i], b[i], c[i]));
    }
    return result;
}

template <class T, class A, class B> inline T clamp(T x, A low, B high) {
    return min(max(x, T(low)), T(high));
}

template <class T, if_scalar<T> = 0> inline T select(T no, T yes, bool condition) {
    return condition ? yes : no;
}

template <class T, int N> inline vec<T, N> select(vec<T, N> no, const vec<T, N> & yes, const vec<bool, N> & condition) {
    for (int i = 0; i < N; i++) {
        no[i] = condition[i] ? yes[i] : no[i];
    }
    return no;
}

template <class T, int N> inline T dot(const vec<T, N> & a, const vec<T, N> & b) {
    T result = T(a[0] * b[0]);
    for (int i = 1; i < N; i++) {
        result = T(result + a[i] * b[i]);
    }
    return result;
}

template <class T, if_scalar<T> = 0> inline bool isnan(T x) {
    return std::isnan(float(x));
}

template <class T, if_scalar<T> = 0> inline bool isinf(T x) {
    return std::isinf(float(x));
}

template <class T, if_scalar<T> = 0> inline bool isfinite(T x) {
    return std::isfinite(float(x));
}

template <int N> inline bool all(const vec<bool, N> & a) {
    bool result = true;
    for (int i = 0; i < N; i++) {
        result = result && a[i];
    }
    return result;
}

template <int N> inline bool any(const vec<bool, N> & a) {
    return !all(!a);
}

}  // namespace metal

#define M_PI_F   (3.14159265358979323846f)
#define MAXFLOAT FLT_MAX
#define MAXHALF  65504.0h
