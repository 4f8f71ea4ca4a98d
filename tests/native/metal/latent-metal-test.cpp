// Latent attention, absorbed, as nodes of ggml's Metal backend, against float64: the cases of the CUDA kernels' test, and
// numbers of rows around the borders of blocks. Prints the largest error and a hash of all results.
//
//   latent-metal-test BACKEND TYPE of the cache        the cases
//   latent-metal-test BACKEND TYPE QUERIES KEYS HEADS MASK SPREAD    one case
//
// MASK and SPREAD: as in LatentShape; the mask `marked`: the node is marked for upstream's kernels
//
// BACKEND: the library with the device MTL0

#include "../latent-cases.h"

static double   worst = 0.0;
static uint64_t hash  = 14695981039346656037u;  // FNV-1a

static void check(ggml_backend_t metal, const LatentSetup & setup) {
    if (!chosen()) {
        return;
    }
    const LatentShape &            s = setup.shape;
    LatentCase                     attention(s);
    ggml_tensor *                  dst  = attention.node();
    struct ggml_backend_graph_copy copy = ggml_backend_graph_copy(metal, attention.nodes());
    CHECK(ggml_backend_graph_compute(metal, copy.graph) == GGML_STATUS_SUCCESS);
    ggml_backend_tensor_get(ggml_graph_node(copy.graph, -1), dst->data, 0, ggml_nbytes(dst));
    ggml_backend_graph_copy_free(copy);

    for (size_t i = 0; i < ggml_nbytes(dst); ++i) {
        hash = (hash ^ ((const uint8_t *) dst->data)[i]) * 1099511628211u;
    }
    const double error = attention.nmse(setup.n_rows == 0 ? s.n_rows() : setup.n_rows);
    worst              = std::max(worst, error);
    expect(error <= limit_of(s.cache), name_of(s) + text(": NMSE against float64 %.1e", error));  // false for NaN too
}

static std::vector<LatentSetup> all_cases(ggml_type type) {
    std::vector<LatentSetup> cases = absorbed_cases(type);
    for (const int64_t n_heads : { 5, 20, 33, 64 }) {
        LatentShape s = LatentShape().with(3, 70);
        s.cache       = type;
        s.n_heads     = n_heads;
        s.n_streams   = n_heads == 5 ? 2 : 1;
        cases.push_back({ s });
    }
    return cases;
}

int main(int argc, char ** argv) {
    CHECK(argc == 3 || argc == 8);
    cpu_registry();
    CHECK(ggml_backend_load(argv[1]));
    const ggml_backend_t metal = ggml_backend_dev_init(ggml_backend_dev_by_name("MTL0"), nullptr);
    const ggml_type      type  = type_of(argv[2]);
    if (argc == 3) {
        for (const LatentSetup & each : all_cases(type)) {
            check(metal, each);
        }
    } else {
        LatentShape s = LatentShape().with(atoi(argv[3]), atoi(argv[4]));
        s.cache       = type;
        s.n_heads     = atoi(argv[5]);
        s.spread      = strtof(argv[7], nullptr);
        s.poison      = true;
        s.plain       = strcmp(argv[6], "marked") == 0;
        s.mask        = s.plain ? "causal" : argv[6];
        check(metal, { s });
    }
    ggml_backend_free(metal);
    printf("largest NMSE %.1e, results %016llx\n", worst, (unsigned long long) hash);
    return report();
}
