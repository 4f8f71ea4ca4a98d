#pragma once

// BF16 numbers as VDPBF16PS and TDPBF16PS read them: for avx512-emulated.h and amx-emulated.h.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

// A float without its subnormal values.
inline float flushed(float x) {
    return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x;
}

inline float from_bf16(uint16_t x) {
    const uint32_t bits = (uint32_t) x << 16;
    float          result;
    memcpy(&result, &bits, sizeof(result));
    return flushed(result);
}

}  // namespace emulated
