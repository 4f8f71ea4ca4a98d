#pragma once

// The CPU backend of the ggml that a program is linked to, memory for its tensors, and the selection of test cases.
//
//   KIMI_CPU_BACKEND   a library of GGML_BACKEND_DL to load; if unset, ggml selects one next to the program
//   KIMI_CASES         N: run only every Nth case; for slow machines (emulated, or under sanitizers)
//   KIMI_THREADS       N: compare the result of one thread only with that of N threads

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

inline ggml_backend_reg_t cpu_registry() {
    static const ggml_backend_reg_t reg = [] {
        if (const char * path = getenv("KIMI_CPU_BACKEND")) {
            ggml_backend_load(path);
        } else if (!ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)) {
            ggml_backend_load_all();
        }
        ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (!dev) {
            fprintf(stderr, "ggml has no CPU backend here\n");
            exit(2);
        }
        return ggml_backend_dev_backend_reg(dev);
    }();
    return reg;
}

inline ggml_backend_t cpu_backend() {
    return ggml_backend_dev_init(ggml_backend_reg_dev_get(cpu_registry(), 0), nullptr);
}

inline void cpu_backend_use(ggml_backend_t backend, int n_threads, bool use_ref) {
    using set_threads_t = void (*)(ggml_backend_t, int);
    using set_ref_t     = void (*)(ggml_backend_t, bool);
    ((set_threads_t) ggml_backend_reg_get_proc_address(cpu_registry(), "ggml_backend_set_n_threads"))(backend,
                                                                                                      n_threads);
    ((set_ref_t) ggml_backend_reg_get_proc_address(cpu_registry(), "ggml_backend_cpu_set_use_ref"))(backend, use_ref);
}

// Whether the CPU backend was compiled for an instruction set, such as "AVX512_VNNI".
inline bool cpu_has(const char * feature) {
    auto get =
        (ggml_backend_get_features_t) ggml_backend_reg_get_proc_address(cpu_registry(), "ggml_backend_get_features");
    for (const ggml_backend_feature * each = get(cpu_registry()); each->name; ++each) {
        if (std::string(each->name) == feature) {
            return std::string(each->value) == "1";
        }
    }
    return false;
}

// How the CPU backend quantizes a type, whether the program is linked to it or has loaded it.
inline const ggml_type_traits_cpu * cpu_traits(ggml_type type) {
    using get_t            = const ggml_type_traits_cpu * (*)(ggml_type);
    static const get_t get = [] {
        cpu_registry();
        const char * path   = getenv("KIMI_CPU_BACKEND");
        void *       handle = dlopen(path, RTLD_LAZY | (path ? RTLD_NOLOAD : 0));
        return (get_t) dlsym(handle, "ggml_get_type_traits_cpu");
    }();
    return get(type);
}

// Numbers of threads whose results are compared with those of one thread. Without OpenMP waiting threads spin, and many
// more of them than cores take minutes.
inline std::vector<int> thread_counts() {
    if (const char * only = getenv("KIMI_THREADS")) {
        return { atoi(only) };
    }
    return cpu_has("OPENMP") ? std::vector<int>{ 2, 7, 33, 100 } : std::vector<int>{ 2, 3, 7 };
}

// The buffer type that repacks weights for this CPU, or nullptr if there is none.
inline ggml_backend_buffer_type_t repack_buffer_type() {
    auto get = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        cpu_registry(), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * each = get(ggml_backend_reg_dev_get(cpu_registry(), 0)); each && *each; ++each) {
        if (std::string(ggml_backend_buft_name(*each)) == "CPU_REPACK") {
            return *each;
        }
    }
    return nullptr;
}

// The tensors of a context, each in its own memory that ends where the tensor ends, so that AddressSanitizer detects
// out-of-bounds accesses. All bytes are initially 0xff, which is NaN.
class ApartBuffers {
  public:
    ApartBuffers() = default;

    ~ApartBuffers() {
        for (ggml_backend_buffer_t buffer : buffers) {
            ggml_backend_buffer_free(buffer);
        }
    }

    ApartBuffers(const ApartBuffers &)             = delete;
    ApartBuffers & operator=(const ApartBuffers &) = delete;

    void allocate(ggml_context * ctx, ggml_backend_t backend) {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (t->view_src != nullptr) {
                ggml_backend_view_init(t);
                continue;
            }
            buffers.push_back(ggml_backend_alloc_buffer(backend, ggml_nbytes(t)));
            ggml_backend_buffer_clear(buffers.back(), 0xff);
            ggml_backend_tensor_alloc(buffers.back(), t, ggml_backend_buffer_get_base(buffers.back()));
        }
    }

  private:
    std::vector<ggml_backend_buffer_t> buffers;
};

// Whether to run the next case.
inline bool chosen() {
    static const char * text  = getenv("KIMI_CASES");
    static const long   share = text ? atol(text) : 1;
    static long         count = 0;
    return count++ % share == 0;
}
