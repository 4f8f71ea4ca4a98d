#pragma once

// The device's data, for our implementation of ggml-metal-device.h and for the functions of ggml-metal-device.m that are
// plain C (build.py extracts them).

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_metal_device {
    struct ggml_metal_device_props  props;
    struct ggml_metal_library *     library;
    struct ggml_metal_fusion_info * finfo;
    void *                          queue;
};

// The id of a device's name, such as "Apple M1 Max"; GENERIC if unknown.
enum ggml_metal_device_id metal_emulator_device_id(const char * name);

// Logs that kernels/LIBRARY.metal could not be compiled. Returns whether the backend works without it.
bool metal_emulator_log_missing(const char * library, const char * error);

#ifdef __cplusplus
}
#endif
