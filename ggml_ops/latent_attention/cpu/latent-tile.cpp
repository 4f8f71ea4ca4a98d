#include "latent-tile.h"

#include "ggml-cpu.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace latent {

constexpr uint16_t MINUS_INF = 0xfc00;  // as F16 bits
constexpr uint16_t MAGNITUDE = 0x7fff;

// A window of fewer keys than this is not worth another look at the mask.
constexpr int64_t MIN_WINDOW = 8;

// Visibility of the keys key_of(0) .. key_of(n_keys - 1) for the queries.
template <typename KeyOf> static View view_of_keys(const MaskRows & mask, int64_t n_keys, const KeyOf & key_of) {
    uint16_t set     = 0;
    uint16_t visible = 0;
    for (int64_t q = 0; q < mask.n_queries; ++q) {
        const ggml_fp16_t * row = mask.row(q);
        for (int64_t i = 0; i < n_keys; ++i) {
            set |= row[key_of(i)] & MAGNITUDE;
            visible |= row[key_of(i)] ^ MINUS_INF;
        }
    }
    return set == 0 ? View::OPEN : visible == 0 ? View::CLOSED : View::MIXED;
}

// The same for a list of keys. Those of a sequence that was never changed follow each other, which is faster to read.
static View view_of_listed(const MaskRows & mask, const int32_t * keys, int64_t n_keys) {
    bool in_order = true;
    for (int64_t i = 1; i < n_keys; ++i) {
        in_order &= keys[i] == keys[0] + i;
    }
    if (in_order) {
        return view_of_keys(mask, n_keys, [&](int64_t i) { return keys[0] + i; });
    }
    return view_of_keys(mask, n_keys, [&](int64_t i) { return keys[i]; });
}

Keys keys_of(const ggml_tensor * order, int64_t group, int64_t n_keys) {
    if (!order) {
        return { nullptr, n_keys };
    }
    const int32_t * cells = (const int32_t *) row_of(order, group);
    const int32_t * end   = std::partition_point(cells, cells + order->ne[0], [](int32_t c) { return c >= 0; });
    return { cells, end - cells };
}

View view_of(const MaskRows & mask, const Keys & keys, int64_t begin, int64_t n_keys) {
    if (!mask.data) {
        return View::OPEN;
    }
    if (!keys.order) {
        return view_of_keys(mask, n_keys, [&](int64_t i) { return begin + i; });
    }
    return view_of_listed(mask, keys.order + begin, n_keys);
}

View view_of(const MaskRows & mask, const KeyTile & tile) {
    return view_of_listed(mask, tile.key, tile.masked ? tile.n_keys : 0);
}

// Starts with the last query: under a causal mask it sees the most.
static bool is_visible(const MaskRows & mask, int64_t key) {
    for (int64_t q = mask.n_queries - 1; q >= 0; --q) {
        if (mask.row(q)[key] != MINUS_INF) {
            return true;
        }
    }
    return false;
}

// The next `n` keys in their order, if a query sees one of them.
static void
ordered_tile(const MaskRows & mask, const Keys & keys, const View * map, int64_t begin, int64_t n, KeyTile & tile) {
    View view = View::CLOSED;
    if (map) {
        for (int64_t group = begin / GROUP_KEYS; group * GROUP_KEYS < begin + n; ++group) {
            view = group * GROUP_KEYS == begin || map[group] == view ? map[group] : View::MIXED;
        }
    } else {
        view = view_of(mask, keys, begin, n);
    }
    if (view != View::CLOSED) {
        std::copy(keys.order + begin, keys.order + begin + n, tile.key);
        tile.n_keys = (int) n;
        tile.masked = view == View::MIXED;
    }
}

int64_t next_tile(const MaskRows & mask,
                  const Keys &     keys,
                  const View *     map,
                  int64_t          begin,
                  int64_t          end,
                  int64_t          capacity,
                  KeyTile &        tile) {
    tile.n_keys = 0;
    tile.masked = false;
    if (keys.order) {
        const int64_t n = std::min(capacity, end - begin);
        ordered_tile(mask, keys, map, begin, n, tile);
        return begin + n;
    }
    while (begin < end && capacity - tile.n_keys >= MIN_WINDOW) {
        const int64_t group  = begin / GROUP_KEYS;
        const int64_t border = map ? std::min(end, (group + 1) * GROUP_KEYS) : end;
        const int64_t n      = std::min(border - begin, capacity - tile.n_keys);
        const View    view   = map ? map[group] : view_of(mask, keys, begin, n);
        if (view != View::CLOSED) {
            tile.masked |= view == View::MIXED;
            for (int64_t key = begin; key < begin + n; ++key) {
                if (view == View::OPEN || is_visible(mask, key)) {
                    tile.key[tile.n_keys++] = (int32_t) key;
                }
            }
        }
        begin += n;
    }
    return begin;
}

void add_mask(
    const KeyTile & tile, const ggml_fp16_t * mask, int64_t col0, int64_t col1, int64_t n_cols, float * scores) {
    for (int i = 0; i < tile.n_keys; ++i) {
        const float m = GGML_CPU_FP16_TO_FP32(mask[tile.key[i]]);
        float *     s = scores + i * n_cols;
        for (int64_t col = col0; col < col1; ++col) {
            s[col] = m == -INFINITY ? -INFINITY : s[col] + m;
        }
    }
}

static bool all_finite(const float * x, int64_t n) {
    return std::all_of(x, x + n, [](float value) { return std::isfinite(value); });
}

void isolate_keys(int n_keys, int64_t n, int64_t ld, float * values, int64_t n_cols, float * scores) {
    for (int i = 0; i < n_keys; ++i) {
        float * score = scores + i * n_cols;
        float * row   = values + i * ld;
        if (!std::isfinite(score[0]) && !all_finite(row, n)) {
            std::fill(score, score + n_cols, NAN);
            std::fill(row, row + n, 0.0f);
        }
    }
}

bool can_read_rows(ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr;
}

static void read_f32(const void * src, float * dst, int64_t n) {
    memcpy(dst, src, n * sizeof(float));
}

static void read_f16(const void * src, float * dst, int64_t n) {
    ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n);
}

static void read_bf16(const void * src, float * dst, int64_t n) {
    ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) src, dst, n);
}

static ggml_to_float_t reader(ggml_type type) {
    switch (type) {
    case GGML_TYPE_F32:
        return read_f32;
    case GGML_TYPE_F16:
        return read_f16;
    case GGML_TYPE_BF16:
        return read_bf16;
    default:
        return ggml_get_type_traits(type)->to_float;
    }
}

void read_row(ggml_type type, const char * src, int64_t n, float * dst) {
    reader(type)(src, dst, n);
}

void read_rows(
    const KeyTile & tile, ggml_type type, const char * src, size_t stride, int64_t n_cols, float * dst, int64_t ldd) {
    const ggml_to_float_t read = reader(type);
    for (int i = 0; i < tile.n_keys; ++i) {
        read(src + tile.key[i] * stride, dst + i * ldd, n_cols);
    }
}

}  // namespace latent
