#pragma once

// Atomic functions. Threads run one at a time, so that plain accesses are enough.

#include "runtime.h"
#include "vector.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T> struct atomic {
    T value;
};

using atomic_int  = atomic<int>;
using atomic_uint = atomic<uint>;

template <class T> struct Same {
    using type = T;
};

template <class T>
__attribute__((no_sanitize("thread"))) inline void
atomic_store_explicit(volatile atomic<T> * at, typename Same<T>::type value, memory_order) {
    metal_emulator::see_atomic(const_cast<atomic<T> *>(at), sizeof(T));
    at->value = value;
}

template <class T>
__attribute__((no_sanitize("thread"))) inline T atomic_load_explicit(const volatile atomic<T> * at, memory_order) {
    metal_emulator::see_atomic(const_cast<const atomic<T> *>(at), sizeof(T));
    return at->value;
}

template <class T>
__attribute__((no_sanitize("thread"))) inline T
atomic_fetch_add_explicit(volatile atomic<T> * at, typename Same<T>::type value, memory_order) {
    metal_emulator::see_atomic(const_cast<atomic<T> *>(at), sizeof(T));
    const T before = at->value;
    at->value      = before + value;
    return before;
}

}  // namespace metal
