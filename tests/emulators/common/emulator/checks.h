#pragma once

// With -fsanitize=alignment,bounds,… a kernel calls these functions if an access is misaligned, an index is out of the
// bounds of an array whose size the compiler knows, or a shift or division is undefined. The names are those of the
// compilers; no sanitizer runtime is linked.

#include "fault.h"

#include <cstdint>

namespace emulator {

// Ends the kernel with a Fault; each emulator defines it.
[[noreturn]] void fail_check(Place place, const std::string & text);

// The compilers' layout of the arguments (GCC's ubsan.cc, clang's).
struct CheckedPlace {
    const char * file;
    uint32_t     line, column;

    operator Place() const { return { file, int(line) }; }
};

struct CheckedType {
    uint16_t kind, info;
    char     name[1];
};

struct CheckedAccess {
    CheckedPlace        place;
    const CheckedType * type;
    uint8_t             log_alignment, kind;
};

struct CheckedIndex {
    CheckedPlace       place;
    const CheckedType *array, *index;
};

struct CheckedOperation {
    CheckedPlace       place;
    const CheckedType *left, *right;
};

}  // namespace emulator

extern "C" {

[[noreturn, gnu::weak]] void __ubsan_handle_type_mismatch_v1_abort(const emulator::CheckedAccess * data,
                                                                   uintptr_t                       address) {
    static const char * const kinds[] = { "a read", "a write", "a reference", "a member access", "a call" };
    const char * const        kind    = data->kind < 5 ? kinds[data->kind] : "an access";
    if (!address) {
        emulator::fail_check(data->place, emulator::format("%s of %s through a null pointer", kind, data->type->name));
    }
    emulator::fail_check(
        data->place, emulator::format("a misaligned access: %s of %s at %p, which must be a multiple of %u bytes", kind,
                                      data->type->name, reinterpret_cast<void *>(address), 1u << data->log_alignment));
}

[[noreturn, gnu::weak]] void __ubsan_handle_out_of_bounds_abort(const emulator::CheckedIndex * data, uintptr_t index) {
    emulator::fail_check(data->place,
                         emulator::format("the index %td is beyond the array %s", ptrdiff_t(index), data->array->name));
}

[[noreturn, gnu::weak]] void
__ubsan_handle_shift_out_of_bounds_abort(const emulator::CheckedOperation * data, uintptr_t left, uintptr_t by) {
    emulator::fail_check(
        data->place, emulator::format("a shift of %s %td by %td", data->left->name, ptrdiff_t(left), ptrdiff_t(by)));
}

[[noreturn, gnu::weak]] void
__ubsan_handle_divrem_overflow_abort(const emulator::CheckedOperation * data, uintptr_t, uintptr_t) {
    emulator::fail_check(data->place, emulator::format("a division of %s without a result", data->left->name));
}

}  // extern "C"
