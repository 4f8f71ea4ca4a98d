#pragma once

// Classes of NVIDIA's devices.

namespace kimi_cuda {

// Devices for data centres, by compute capability in ggml's encoding: A100, H100 and H200, B200.
constexpr bool is_data_centre(int capability) {
    return capability == 800 || capability == 900 || (capability >= 1000 && capability < 1100);
}

}  // namespace kimi_cuda
