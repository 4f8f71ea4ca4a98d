#pragma once

// Tiles of keys: the keys of the cache that the current queries can see, and their rows as float32.

#include "ggml.h"

#include <cstdint>

namespace latent {

constexpr int MAX_TILE_KEYS = 128;

// Alignment of the parts of the work buffer, in floats: one cache line.
constexpr int64_t ALIGN = 64 / sizeof(float);

constexpr int64_t align(int64_t n) {
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

struct Layout {
    int64_t size = 0;

    // Returns the offset of the n floats.
    int64_t add(int64_t n) {
        const int64_t at = size;
        size += align(n);
        return at;
    }
};

// A row of a tensor by its outer indices.
inline char * row_of(const ggml_tensor * t, int64_t i1, int64_t i2 = 0, int64_t i3 = 0) {
    return (char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3];
}

// The keys that some queries may see, as cells of the cache. With an order (a list of cells, in the order of the
// positions of their tokens) they are counted in that order, so that tiles do not depend on where the cells are.
struct Keys {
    const int32_t * order;  // null: the cells 0, 1, 2 ...
    int64_t         n;

    int32_t cell(int64_t i) const { return order ? order[i] : (int32_t) i; }
};

// The source `order` of a node ([cells, groups] as int32, each list ends with -1, or null) for one of the groups of
// queries; n_keys: without one.
Keys keys_of(const ggml_tensor * order, int64_t group, int64_t n_keys);

// Some cells.
struct KeyTile {
    int     n_keys;
    int32_t key[MAX_TILE_KEYS];
    bool    masked;  // false: the mask of all these queries is zero on all these keys
};

// The mask rows (F16, one entry per key) of neighbouring queries, row stride `stride` bytes. No mask: data is null.
struct MaskRows {
    const char * data;
    size_t       stride;
    int64_t      n_queries;

    const ggml_fp16_t * row(int64_t query) const { return (const ggml_fp16_t *) (data + query * stride); }
};

// The mask of the queries from query0 on; mask may be null.
inline MaskRows mask_rows(const ggml_tensor * mask, int64_t stream, int64_t query0, int64_t n_queries) {
    if (!mask) {
        return { nullptr, 0, n_queries };
    }
    return { row_of(mask, query0, 0, stream % mask->ne[3]), mask->nb[1], n_queries };
}

// Visibility of some keys for some queries.
enum class View : uint8_t {
    OPEN,    // all keys, and their mask is zero
    CLOSED,  // no keys
    MIXED,
};
View view_of(const MaskRows & mask, const Keys & keys, int64_t begin, int64_t n_keys);
View view_of(const MaskRows & mask, const KeyTile & tile);

// Collects the next tile from the keys [begin, end), of which at least one query sees some; returns the key to continue
// from. n_keys is 0 if there are none. With an order, a tile is the next `capacity` keys; without one, as many visible
// ones. map: null, or the visibility of each GROUP_KEYS keys from key 0 on for these queries, for callers that would
// otherwise read the same mask many times; `capacity` is then a multiple of GROUP_KEYS.
constexpr int64_t GROUP_KEYS = 64;
int64_t           next_tile(const MaskRows & mask,
                            const Keys &     keys,
                            const View *     map,
                            int64_t          begin,
                            int64_t          end,
                            int64_t          capacity,
                            KeyTile &        tile);

// Adds the mask of one query to the columns [col0, col1) of scores[n_keys][n_cols]. If the mask is -inf, the score
// becomes -inf, even if it was NaN.
void add_mask(
    const KeyTile & tile, const ggml_fp16_t * mask, int64_t col0, int64_t col1, int64_t n_cols, float * scores);

// For keys whose values (rows [n_keys][n] with stride ld) have an infinity or NaN: sets their scores [n_keys][n_cols], to
// which no mask has been added, to NaN and the values to 0. Queries that see such a key then have the result NaN, and
// others multiply 0 by 0.
void isolate_keys(int n_keys, int64_t n, int64_t ld, float * values, int64_t n_cols, float * scores);

// Whether read_row supports the type.
bool can_read_rows(ggml_type type);

void read_row(ggml_type type, const char * src, int64_t n, float * dst);

// dst[i*ldd .. + n_cols] = the tile's i-th row of src, whose row stride is `stride` bytes; n_cols in whole blocks.
void read_rows(
    const KeyTile & tile, ggml_type type, const char * src, size_t stride, int64_t n_cols, float * dst, int64_t ldd);

}  // namespace latent
