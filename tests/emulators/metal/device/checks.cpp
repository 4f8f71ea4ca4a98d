// With -fsanitize=alignment,bounds,… a kernel calls these functions if an access is misaligned, an index is out of the
// bounds of an array whose size the compiler knows, or a shift or division is undefined. The names are GCC's; no
// sanitizer runtime is linked.

#include "emulator.h"

namespace {

struct CheckedPlace {
    const char * file;
    uint32_t     line, column;
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

[[noreturn]] void fail_check(const CheckedPlace & place, const std::string & text) {
    metal_emulator::fail(metal_emulator::text_of({ place.file, int(place.line) }) + ": " + text);
}

}  // namespace

extern "C" {

[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(const CheckedAccess * data, uintptr_t address) {
    if (!address) {
        fail_check(data->place, metal_emulator::format("an access of %s through a null pointer", data->type->name));
    }
    fail_check(data->place,
               metal_emulator::format("a misaligned access: %s at %p, which must be a multiple of %u bytes",
                                      data->type->name, reinterpret_cast<void *>(address), 1u << data->log_alignment));
}

[[noreturn]] void __ubsan_handle_out_of_bounds_abort(const CheckedIndex * data, uintptr_t index) {
    fail_check(data->place,
               metal_emulator::format("the index %td is beyond the array %s", ptrdiff_t(index), data->array->name));
}

[[noreturn]] void
__ubsan_handle_shift_out_of_bounds_abort(const CheckedOperation * data, uintptr_t left, uintptr_t by) {
    fail_check(data->place,
               metal_emulator::format("a shift of %s %td by %td", data->left->name, ptrdiff_t(left), ptrdiff_t(by)));
}

[[noreturn]] void __ubsan_handle_divrem_overflow_abort(const CheckedOperation * data, uintptr_t, uintptr_t) {
    fail_check(data->place, metal_emulator::format("a division of %s without a result", data->left->name));
}

}  // extern "C"
