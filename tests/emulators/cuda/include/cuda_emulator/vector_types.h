#pragma once

// CUDA's vector types: float4 and similar, with their alignment, and dim3.

#include <cstdint>

namespace cuda_emulator {

template <class T, int N, int ALIGNMENT> struct Vector;

template <class T, int ALIGNMENT> struct alignas(ALIGNMENT) Vector<T, 1, ALIGNMENT> {
    T x;
};

template <class T, int ALIGNMENT> struct alignas(ALIGNMENT) Vector<T, 2, ALIGNMENT> {
    T x, y;
};

template <class T, int ALIGNMENT> struct alignas(ALIGNMENT) Vector<T, 3, ALIGNMENT> {
    T x, y, z;
};

template <class T, int ALIGNMENT> struct alignas(ALIGNMENT) Vector<T, 4, ALIGNMENT> {
    T x, y, z, w;
};

}  // namespace cuda_emulator

// Name1 … Name4 and make_Name1 … make_Name4; vectors of 3 have the alignment of one element.
#define CUDA_EMULATOR_VECTORS(Name, T)                                                                                 \
    using Name##1 = cuda_emulator::Vector<T, 1, sizeof(T)>;                                                            \
    using Name##2 = cuda_emulator::Vector<T, 2, 2 * sizeof(T)>;                                                        \
    using Name##3 = cuda_emulator::Vector<T, 3, sizeof(T)>;                                                            \
    using Name##4 = cuda_emulator::Vector<T, 4, (4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T))>;                            \
    inline constexpr Name##1 make_##Name##1(T x) {                                                                     \
        return Name##1 { x };                                                                                          \
    }                                                                                                                  \
    inline constexpr Name##2 make_##Name##2(T x, T y) {                                                                \
        return Name##2 { x, y };                                                                                       \
    }                                                                                                                  \
    inline constexpr Name##3 make_##Name##3(T x, T y, T z) {                                                           \
        return Name##3 { x, y, z };                                                                                    \
    }                                                                                                                  \
    inline constexpr Name##4 make_##Name##4(T x, T y, T z, T w) {                                                      \
        return Name##4 { x, y, z, w };                                                                                 \
    }

CUDA_EMULATOR_VECTORS(char, signed char)
CUDA_EMULATOR_VECTORS(uchar, unsigned char)
CUDA_EMULATOR_VECTORS(short, short)
CUDA_EMULATOR_VECTORS(ushort, unsigned short)
CUDA_EMULATOR_VECTORS(int, int)
CUDA_EMULATOR_VECTORS(uint, unsigned int)
CUDA_EMULATOR_VECTORS(long, long)
CUDA_EMULATOR_VECTORS(ulong, unsigned long)
CUDA_EMULATOR_VECTORS(longlong, long long)
CUDA_EMULATOR_VECTORS(ulonglong, unsigned long long)
CUDA_EMULATOR_VECTORS(float, float)
CUDA_EMULATOR_VECTORS(double, double)
#undef CUDA_EMULATOR_VECTORS

struct dim3 {
    unsigned x, y, z;

    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
    constexpr operator uint3() const { return uint3{ x, y, z }; }
};
