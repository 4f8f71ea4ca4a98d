#pragma once

// Operators verify themselves: before the operators are used on a GPU, a separate process (kimi-verify) compares each of
// them there with the CPU, once for each device, driver and build. An operator that fails is not used on that device by
// this process. Specification: README.md next to this file in its source repository.

#include "ggml-backend.h"

#include <array>
#include <string>

// What is checked, and switched off, separately.
enum ggml_verify_part {
    GGML_VERIFY_KDA_CONV,
    GGML_VERIFY_KDA_SCAN,
    GGML_VERIFY_STATE_COPY,  // eliding the copy of the new states after these two
    GGML_VERIFY_ABSORBED,    // FLASH_ATTN_EXT over a latent cache
    GGML_VERIFY_LATENT_ATTN,
    GGML_VERIFY_FUSED,   // residual and norm, and on Metal the router, as one kernel each
    GGML_VERIFY_MATVEC,  // MUL_MAT and MUL_MAT_ID with one column
    GGML_VERIFY_N_PARTS,
};

enum ggml_verify_state {
    GGML_VERIFY_NOT_CHECKED,
    GGML_VERIFY_ABSENT,  // the device does not have it
    GGML_VERIFY_PASSED,
    GGML_VERIFY_WRONG,
    GGML_VERIFY_HANGS,
    GGML_VERIFY_CRASHES,
    GGML_VERIFY_N_STATES,
};

struct ggml_verify_result {
    ggml_verify_state state = GGML_VERIFY_NOT_CHECKED;
    double            nmse  = 0;  // of the case with the largest ratio of NMSE to bound
    double            bound = 0;
    std::string       name;  // of that case, or of the case that hangs or crashes, or why the part was not checked
};

struct ggml_verify_report {
    std::string                                         device;
    std::string                                         driver;
    std::string                                         build;
    std::array<ggml_verify_result, GGML_VERIFY_N_PARTS> results;
    std::string                                         problem;  // why the device could not be checked
    double                                              start_seconds = 0;
    double                                              check_seconds = 0;
};

// The name (ggml_backend_reg_get_proc_address) under which a backend provides a function that returns whether the device has
// its own kernels for matmuls of one column.
#define GGML_BACKEND_HAS_MATVEC "ggml_backend_has_matvec"
typedef bool (*ggml_backend_has_matvec_t)(ggml_backend_dev_t dev);

// Asks the device's backend.
GGML_API bool ggml_verify_has_matvec(ggml_backend_dev_t dev);

GGML_API const char * ggml_verify_part_name(ggml_verify_part part);
GGML_API const char * ggml_verify_state_name(ggml_verify_state state);

// Checks the operators of a device, or reads the results of an earlier check from the cache, and logs what is not used.
// Later calls in the same process return the same report; `again` repeats the check. Returns nullptr, and all operators
// are used, if the device is not a GPU or belongs to another machine (its server checks it), or if
// KIMI_VERIFY_SECONDS is 0 (unless `again`).
GGML_API const ggml_verify_report * ggml_verify_device(ggml_backend_dev_t dev, bool again = false);

// Why a part is not used: the figure or the reason. Empty: it is used where the device has it.
GGML_API std::string ggml_verify_reason(const ggml_verify_report & report, ggml_verify_part part);

// For ggml-backend.cpp. `allows`: whether the device may compute this node. `mark`: marks the nodes of a graph that the
// device is about to compute, so that it does not use paths inside operators that failed. `marked`: the node with these
// marks, since the memory that it needs depends on them.
bool        ggml_verify_allows(ggml_backend_dev_t dev, const ggml_tensor * node);
ggml_tensor ggml_verify_marked(ggml_backend_dev_t dev, const ggml_tensor * node);
void        ggml_verify_mark(ggml_backend_dev_t dev, ggml_cgraph * graph);
