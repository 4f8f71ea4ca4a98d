#pragma once

// What the host code of our Metal kernels has in common.

#include "ggml-backend-impl.h"
#include "ggml-metal-device.h"

#include <atomic>
#include <string>

// Where a tensor is: also a view.
inline ggml_metal_buffer_id ggml_metal_buffer_of(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
}

// The threads that a kernel of ours allows, if that was too few; 0: none was found.
inline std::atomic<int> ggml_metal_small_kernel{ 0 };

// ... since the last call. For kimi-verify, which reports it.
inline int ggml_metal_take_small_kernel() {
    return ggml_metal_small_kernel.exchange(0);
}

// Whether the kernel compiled and its threadgroups can have n threads: with many registers they can have fewer than 1024.
inline bool ggml_metal_pipeline_allows(const ggml_metal_pipeline_with_params & pipeline, int n) {
    const int most = pipeline.pipeline ? ggml_metal_pipeline_max_theads_per_threadgroup(pipeline) : n;
    if (most < n) {
        ggml_metal_small_kernel = most;
    }
    return pipeline.pipeline && most >= n;
}

// The pipeline `name` of the kernel `base`. It is compiled when it is first needed, with the function constants that
// set(cv) sets.
template <typename Set>
ggml_metal_pipeline_with_params
ggml_metal_pipeline_of(ggml_metal_library_t lib, const std::string & base, const std::string & name, const Set & set) {
    ggml_metal_pipeline_with_params res = ggml_metal_library_get_pipeline(lib, name.c_str());
    if (!res.pipeline) {
        ggml_metal_cv_t cv = ggml_metal_cv_init();
        set(cv);
        res = ggml_metal_library_compile_pipeline(lib, base.c_str(), name.c_str(), cv);
        ggml_metal_cv_free(cv);
    }
    return res;
}
