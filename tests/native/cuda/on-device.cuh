#pragma once

// A node and its sources in arrays of the emulator, one per distinct start address, so that out-of-bounds accesses are
// detected.

#include "cuda_emulator/harness.h"
#include "ggml.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

class OnDevice {
  public:
    // size: bytes for the node's result and what its kernels need behind it.
    explicit OnDevice(ggml_tensor * node, size_t size) : host(node), device(*node) {
        for (int i = 0; i < GGML_MAX_SRC; ++i) {
            if (node->src[i] != nullptr) {
                device.src[i] = &(sources[i] = *node->src[i]);
                move(sources[i], ggml_nbytes(&sources[i]));
            }
        }
        move(device, std::max(size, ggml_nbytes(node)));
    }

    ggml_tensor * node() { return &device; }

    // Copies the result to the node.
    void fetch() const { memcpy(host->data, device.data, ggml_nbytes(host)); }

  private:
    ggml_tensor *                                            host;
    ggml_tensor                                              device;
    ggml_tensor                                              sources[GGML_MAX_SRC];
    std::map<const void *, cuda_emulator::DeviceArray<char>> arrays;

    void move(ggml_tensor & t, size_t size) {
        const char *      data = static_cast<const char *>(t.data);
        std::vector<char> bytes(data, data + ggml_nbytes(&t));
        bytes.resize(size, '\xff');  // NaN
        t.data = arrays.try_emplace(t.data, bytes).first->second.data();
    }
};
