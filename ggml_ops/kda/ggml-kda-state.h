#pragma once

// The recurrent states of a KDA operator (KDA_CONV or KDA_SCAN), and the copy of the new ones into the cache after it,
// which a backend can elide by writing them there itself.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_cgraph;

// Data common to both operators.
struct ggml_kda_states {
    const struct ggml_tensor * cache;  // [state, R]
    const struct ggml_tensor * rows;   // [S] int32: the row that each sequence continues
    int32_t                    zero_row;
    int32_t                    n_snapshots;
    int64_t                    n_tokens;   // per sequence
    int64_t                    n_written;  // number of slots that the operator writes: min(n_tokens + 1, n_snapshots)
    size_t                     offset;     // offset of the states in the result, bytes
};

GGML_API struct ggml_kda_states ggml_kda_get_states(const struct ggml_tensor * op);

// The copy, and the nodes that llama.cpp inserts between operator and copy for cells outside the batch: one fills a row
// with zeros, one gathers rows, one stores them in other rows.
struct ggml_kda_state_copy {
    struct ggml_tensor * to;         // [state, S, n_written], view of the cache; NULL: there is no copy to elide
    int64_t              first_row;  // index of the first row of `to` in the cache
    struct ggml_tensor * fill;       // fills row zero_row with zeros; NULL: none
    struct ggml_tensor * gather;     // NULL: none
    struct ggml_tensor * store;      // contiguous rows outside `to`; NULL: none
    int                  n_nodes;    // nodes after the operator up to and including the copy
};

// The copy of the new states of the operator at node_n. It copies exactly the states that the operator writes, into
// whole rows of the operator's cache, and no other node reads them from the result. The contents of `rows` are not
// checked: one sequence may read a row that another one writes.
GGML_API struct ggml_kda_state_copy ggml_kda_find_state_copy(const struct ggml_cgraph * cgraph, int node_n);

// Whether the copy writes row `row` of the cache.
GGML_API bool ggml_kda_state_copy_writes(const struct ggml_kda_state_copy * copy, int64_t row);

#ifdef __cplusplus
}
#endif
