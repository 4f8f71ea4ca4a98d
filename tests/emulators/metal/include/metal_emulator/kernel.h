#pragma once

// Arguments of a kernel, and what its shared object exports.

#include "runtime.h"
#include "vector.h"

#include <type_traits>

namespace metal_emulator {

template <class T> struct is_vector : std::false_type {};

template <class T, int N> struct is_vector<metal::vec<T, N>> : std::true_type {};

// Position of a thread or a size, as a vector or its first component.
template <class T> T components(Size size) {
    if constexpr (is_vector<T>::value) {
        const uint32_t all[3] = { size.x, size.y, size.z };
        T              result;
        for (unsigned i = 0; i < sizeof(result.element) / sizeof(result.element[0]); i++) {
            result.element[i] = all[i];
        }
        return result;
    } else {
        return T(size.x);
    }
}

template <class T> T pointer(void * argument) {
    if constexpr (std::is_reference_v<T>) {
        return *static_cast<std::remove_reference_t<T> *>(argument);
    } else {
        return static_cast<T>(argument);
    }
}

// One struct for each kind of parameter, with a function that returns its value.
struct NoBuffer {
    static constexpr uint64_t BUFFERS = 0;
};

template <unsigned INDEX> struct Buffer {
    static constexpr uint64_t BUFFERS = uint64_t(1) << INDEX;

    template <class T> static T get() { return pointer<T>(buffer_argument(INDEX)); }
};

template <unsigned INDEX> struct ThreadgroupMemory : NoBuffer {
    template <class T> static T get() { return pointer<T>(threadgroup_argument(INDEX)); }
};

#define METAL_EMULATOR_POSITION(NAME, VALUE)                                                                           \
    struct NAME : NoBuffer {                                                                                           \
        template <class T> static T get() {                                                                            \
            const Position p = position();                                                                             \
            return components<T>(VALUE);                                                                               \
        }                                                                                                              \
    };

METAL_EMULATOR_POSITION(threadgroup_position_in_grid, p.threadgroup_position_in_grid)
METAL_EMULATOR_POSITION(threadgroups_per_grid, p.threadgroups_per_grid)
METAL_EMULATOR_POSITION(thread_position_in_threadgroup, p.thread_position_in_threadgroup)
METAL_EMULATOR_POSITION(threads_per_threadgroup, p.threads_per_threadgroup)
METAL_EMULATOR_POSITION(thread_index_in_threadgroup, (Size{ p.thread_index_in_threadgroup, 0, 0 }))
METAL_EMULATOR_POSITION(simdgroup_index_in_threadgroup, (Size{ p.simdgroup_index_in_threadgroup, 0, 0 }))
METAL_EMULATOR_POSITION(thread_index_in_simdgroup, (Size{ p.thread_index_in_simdgroup, 0, 0 }))
METAL_EMULATOR_POSITION(threads_per_simdgroup, (Size{ 32, 1, 1 }))
METAL_EMULATOR_POSITION(simdgroups_per_threadgroup,
                        (Size{ uint32_t((p.threads_per_threadgroup.count() + 31) / 32), 1, 1 }))
METAL_EMULATOR_POSITION(
    thread_position_in_grid,
    (Size{ p.threadgroup_position_in_grid.x * p.threads_per_threadgroup.x + p.thread_position_in_threadgroup.x,
           p.threadgroup_position_in_grid.y * p.threads_per_threadgroup.y + p.thread_position_in_threadgroup.y,
           p.threadgroup_position_in_grid.z * p.threads_per_threadgroup.z + p.thread_position_in_threadgroup.z }))
#undef METAL_EMULATOR_POSITION

template <class... PARAMETER, class... T> void call(void (*kernel)(T...)) {
    kernel(PARAMETER::template get<T>()...);
}

inline const FunctionConstant * function_constants = nullptr;  // of this shared object

// Registers a function constant; the kernels of the file read `value`.
template <class T> struct Constant : FunctionConstant {
    Constant(unsigned index, T * value, const char * name) :
        FunctionConstant{ index, type(), value, name, function_constants } {
        function_constants = this;
    }

    static constexpr ConstantType type() {
        static_assert(std::is_same_v<T, bool> || std::is_same_v<T, short> || std::is_same_v<T, int>);
        return std::is_same_v<T, bool>    ? ConstantType::boolean
               : std::is_same_v<T, short> ? ConstantType::int16
                                          : ConstantType::int32;
    }
};

template <class... PARAMETER> constexpr uint64_t buffers_of() {
    return (PARAMETER::BUFFERS | ... | 0);
}

}  // namespace metal_emulator

// KERNEL: its name with template arguments, in parentheses. The rest: its parameters.
#define METAL_EMULATOR_EXPORT(KERNEL, ...)                                                                             \
    extern "C" __attribute__((visibility("default"))) const metal_emulator::Kernel metal_emulator_kernel = {           \
        [] { metal_emulator::call<__VA_ARGS__>(&METAL_EMULATOR_BARE KERNEL); }, &metal_emulator::function_constants,   \
        metal_emulator::buffers_of<__VA_ARGS__>()                                                                      \
    };
#define METAL_EMULATOR_BARE(...) __VA_ARGS__
