// Nodes that ggml-metal computes with one dispatch of ours, against float64, and nodes that are almost like them, against
// the CPU. The first node of a run that has to be one dispatch is named "one", of the others "apart".
//
// Arguments: the backend's library with the device MTL0. Prints the number of runs that have to be one dispatch.

#include "../check.h"
#include "../cpu_backend.h"
#include "common/ggml-op-marks.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

static constexpr double LIMIT = 1e-10;

using Floats  = std::vector<float>;
using Doubles = std::vector<double>;

static ggml_backend_t metal, cpu;
static int            n_one = 0;

// A graph with its inputs, which are the same each time it is built.
class Nodes {
  public:
    ggml_context * const       ctx   = ggml_init({ 4 << 20, nullptr, true });
    ggml_cgraph * const        graph = ggml_new_graph(ctx);
    std::vector<ggml_tensor *> results;
    // a tensor, and one in whose memory it is: as the allocator reuses memory
    std::vector<std::pair<ggml_tensor *, ggml_tensor *>> moved;

    Nodes() = default;

    ~Nodes() { ggml_free(ctx); }

    Nodes(const Nodes &)             = delete;
    Nodes & operator=(const Nodes &) = delete;

    ggml_tensor * input(const Floats & values, int64_t a, int64_t b = 1) {
        ggml_tensor * t = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, a, b);
        CHECK((int64_t) values.size() == a * b);
        inputs.push_back({ t, values });
        return t;
    }

    ggml_tensor * normal(int64_t a, int64_t b = 1, float deviation = 1.0f) {
        std::normal_distribution<float> d(0.0f, deviation);
        Floats                          x(a * b);
        std::generate(x.begin(), x.end(), [&] { return d(rng); });
        return input(x, a, b);
    }

    const Floats & values(const ggml_tensor * t) const {
        const auto found =
            std::find_if(inputs.begin(), inputs.end(), [&](const auto & each) { return each.first == t; });
        CHECK(found != inputs.end());
        return found->second;
    }

    void add(ggml_tensor * t) { ggml_build_forward_expand(graph, t); }

    ggml_tensor * result(ggml_tensor * t) {
        add(t);
        results.push_back(t);
        return t;
    }

    // Memory is NaN at first.
    std::vector<Floats> compute(ggml_backend_t backend) {
        const ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        ggml_backend_buffer_clear(buffer, 0xff);
        for (const auto & [t, to] : moved) {
            t->data = to->data;
        }
        for (const auto & [t, values] : inputs) {
            ggml_backend_tensor_set(t, values.data(), 0, ggml_nbytes(t));
        }
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            CHECK(ggml_backend_supports_op(backend, ggml_graph_node(graph, i)));
        }
        CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);
        std::vector<Floats> values;
        for (const ggml_tensor * t : results) {
            values.emplace_back(ggml_nelements(t));
            ggml_backend_tensor_get(t, values.back().data(), 0, ggml_nbytes(t));
        }
        ggml_backend_buffer_free(buffer);
        return values;
    }

  private:
    std::vector<std::pair<ggml_tensor *, Floats>> inputs;
    std::mt19937                                  rng{ 1 };
};

template <typename T> static double nmse(const Floats & got, const std::vector<T> & want) {
    double error = 0.0, power = 0.0;
    for (size_t i = 0; i < want.size(); ++i) {
        error += ((double) got[i] - want[i]) * ((double) got[i] - want[i]);
        power += (double) want[i] * want[i];
    }
    return error / power;
}

// Nodes that have to be one dispatch; `want`: of each result.
static void test_one(const std::string & name, Nodes & nodes, const std::vector<Doubles> & want) {
    const std::vector<Floats> got = nodes.compute(metal);
    CHECK(got.size() == want.size());
    for (size_t i = 0; i < want.size(); ++i) {
        const double error = nmse(got[i], want[i]);
        expect(error <= LIMIT, name + text(", result %d: NMSE %.1e", (int) i, error));
    }
    ++n_one;
}

// Nodes that must not be one dispatch; n: runs among them that have to be. build: builds them.
static void test_apart(const std::string & name, const std::function<void(Nodes &)> & build, int n = 0) {
    std::vector<Floats> values[2];
    for (const bool on_cpu : { false, true }) {
        Nodes nodes;
        build(nodes);
        values[on_cpu] = nodes.compute(on_cpu ? cpu : metal);
    }
    for (size_t i = 0; i < values[1].size(); ++i) {
        const double error = nmse(values[0][i], values[1][i]);
        expect(error <= LIMIT, name + text(", result %d: NMSE %.1e", (int) i, error));
    }
    n_one += n;
}

// Routers

// groups: four experts each have the same. negative: with the bias. unlikely: the weights are smaller than their limit.
enum class Scores { different, equal, groups, negative, unlikely };

struct Router {
    int64_t n_experts;
    int64_t n_chosen;
    int64_t n_tokens = 2;
    Scores  scores   = Scores::different;
    float   max      = INFINITY;  // of the sum of the weights

    static constexpr float min = 6.103515625e-5f, scale = 2.446f;

    float logit(int64_t token, int64_t expert) const {
        const int64_t rank = (expert * 37 + token * 53) % n_experts;
        if (scores == Scores::equal || scores == Scores::unlikely) {
            return scores == Scores::equal ? 0.0f : -25.0f;
        }
        return 8.0f * (scores == Scores::groups ? rank / 4 : rank) / n_experts - 4.0f;
    }

    float bias(int64_t expert) const {
        switch (scores) {
        case Scores::different:
            return 2.0f * (expert % 3);
        case Scores::negative:
            return 2.0f * (expert % 3) - 10.0f;
        case Scores::unlikely:
            return 0.01f * (expert * 11 % n_experts);
        default:
            return 0.0f;
        }
    }

    // Weights, and indices of the experts: of equal ones the first ones.
    std::vector<Doubles> want() const {
        Doubles weights, ids;
        for (int64_t t = 0; t < n_tokens; ++t) {
            const auto           p = [&](int64_t expert) { return 1.0 / (1.0 + std::exp(-(double) logit(t, expert))); };
            std::vector<int64_t> order(n_experts);
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(),
                             [&](int64_t a, int64_t b) { return p(a) + bias(a) > p(b) + bias(b); });
            double sum = 0.0;
            for (int64_t i = 0; i < n_chosen; ++i) {
                sum += p(order[i]);
            }
            for (int64_t i = 0; i < n_chosen; ++i) {
                weights.push_back(p(order[i]) / std::min(std::max(sum, (double) min), (double) max) * scale);
                ids.push_back(order[i]);
            }
        }
        return { weights, ids };
    }
};

enum class Odd {
    none,
    marked,
    output,
    scores_read,
    order_read,
    ascending,
    second_best,
    scale_with_bias,
    other_unary,
    bias_of_tokens,
    biased_weights,
    strided,
    view_between,
    memory_reused,  // one dispatch: the order is written where the node before it reads
    bias_computed,  // one dispatch: by the node before it
};

// The nodes that llama.cpp builds for sigmoid scores with a selection bias (ggml-router-nodes.h).
static void build_router(Nodes & nodes, const Router & r, Odd odd) {
    ggml_context * ctx    = nodes.ctx;
    const int64_t  stride = odd == Odd::strided ? 2 * r.n_experts : r.n_experts;
    Floats         logit_values(stride * r.n_tokens, NAN), bias_values;
    for (int64_t t = 0; t < r.n_tokens; ++t) {
        for (int64_t e = 0; e < r.n_experts; ++e) {
            logit_values[t * stride + e] = r.logit(t, e);
        }
    }
    for (int64_t i = 0; i < (odd == Odd::bias_of_tokens ? r.n_tokens : 1); ++i) {
        for (int64_t e = 0; e < r.n_experts; ++e) {
            bias_values.push_back(r.bias(e) + 0.3f * i * (e % 5));
        }
    }
    ggml_tensor * logits = nodes.input(logit_values, stride, r.n_tokens);
    ggml_tensor * bias   = nodes.input(bias_values, r.n_experts, bias_values.size() / r.n_experts);
    ggml_tensor * old    = nodes.normal(r.n_experts, r.n_tokens);
    if (odd == Odd::strided) {
        logits = ggml_view_2d(ctx, logits, r.n_experts, r.n_tokens, logits->nb[1], 0);
    } else if (odd == Odd::bias_computed) {
        bias = ggml_scale(ctx, bias, 1.0f);
        nodes.add(bias);
    } else if (odd == Odd::memory_reused) {
        nodes.add(ggml_scale(ctx, old, 1.0f));
    }
    ggml_tensor * scores = odd == Odd::other_unary ? ggml_exp(ctx, logits) : ggml_sigmoid(ctx, logits);
    ggml_set_name(scores, "one");
    nodes.add(scores);
    if (odd == Odd::view_between) {
        nodes.add(ggml_view_1d(ctx, old, 4, 0));
    }
    const auto    by_expert = [&](ggml_tensor * t) { return ggml_reshape_3d(ctx, t, 1, r.n_experts, r.n_tokens); };
    ggml_tensor * p         = by_expert(scores);
    ggml_tensor * biased    = ggml_add(ctx, scores, bias);
    ggml_tensor * sorted =
        ggml_argsort(ctx, biased, odd == Odd::ascending ? GGML_SORT_ORDER_ASC : GGML_SORT_ORDER_DESC);
    ggml_tensor * chosen =
        ggml_view_2d(ctx, sorted, r.n_chosen, r.n_tokens, sorted->nb[1], odd == Odd::second_best ? sizeof(int32_t) : 0);
    ggml_tensor * w = ggml_get_rows(ctx, odd == Odd::biased_weights ? by_expert(biased) : p, chosen);
    w               = ggml_reshape_2d(ctx, w, r.n_chosen, r.n_tokens);
    w               = ggml_div(ctx, w, ggml_clamp(ctx, ggml_sum_rows(ctx, w), r.min, r.max));
    w               = ggml_reshape_3d(ctx, w, 1, r.n_chosen, r.n_tokens);
    w = odd == Odd::scale_with_bias ? ggml_scale_bias(ctx, w, r.scale, 0.5f) : ggml_scale(ctx, w, r.scale);
    nodes.result(w);
    nodes.result(ggml_cast(ctx, chosen, GGML_TYPE_F32));
    switch (odd) {
    case Odd::marked:
        return ggml_op_set_mark(scores, GGML_OP_MARK_UNFUSED);
    case Odd::output:
        return ggml_set_output(biased);
    case Odd::scores_read:
        nodes.result(ggml_scale(ctx, scores, 1.0f));
        return;
    case Odd::order_read:
        nodes.result(
            ggml_cast(ctx, ggml_view_2d(ctx, sorted, r.n_experts, r.n_tokens, sorted->nb[1], 0), GGML_TYPE_F32));
        return;
    case Odd::memory_reused:
        nodes.moved = { { sorted, old }, { chosen, old } };
        return;
    default:
        return;
    }
}

static void test_routers() {
    const Router routers[] = {
        { 65, 8, 3 },
        { 64, 6 },
        { 33, 1 },
        { 8, 8 },
        { 40, 32 },
        { 1024, 4, 1 },
        { 256, 8, 2, Scores::groups },
        { 96, 32, 2, Scores::groups },
        { 256, 8, 2, Scores::equal },
        { 65, 32, 1, Scores::equal },
        { 64, 6, 2, Scores::different, 0.5f },
        { 33, 8, 2, Scores::negative },
        { 64, 6, 2, Scores::unlikely },
    };
    for (const Router & r : routers) {
        Nodes nodes;
        build_router(nodes, r, Odd::none);
        test_one(text("%d of %d experts, scores %d", (int) r.n_chosen, (int) r.n_experts, (int) r.scores), nodes,
                 r.want());
    }
    const Router r = { 64, 6 };
    for (const Odd odd : { Odd::memory_reused, Odd::bias_computed }) {
        Nodes nodes;
        build_router(nodes, r, odd);
        test_one(text("router, peculiarity %d", (int) odd), nodes, r.want());
    }
    for (int odd = (int) Odd::marked; odd <= (int) Odd::view_between; ++odd) {
        test_apart(text("router, peculiarity %d", odd), [&](Nodes & nodes) { build_router(nodes, r, (Odd) odd); });
    }
    for (const Router & large : { Router{ 1025, 4 }, Router{ 40, 33 } }) {
        test_apart(text("%d of %d experts", (int) large.n_chosen, (int) large.n_experts),
                   [&](Nodes & nodes) { build_router(nodes, large, Odd::none); });
    }
}

// Residuals and norms

static constexpr float EPS = 1e-5f;

static void test_norms() {
    const struct {
        int64_t n_values, n_tokens;
        int     n_adds;
        float   deviation;
    } shapes[] = {
        { 4, 1, 1, 1.0f },    { 36, 3, 2, 1.0f },    { 132, 2, 1, 1.0f },  { 160, 3, 2, 3e-3f },
        { 2304, 2, 1, 1.0f }, { 4096, 1, 2, 10.0f }, { 4100, 2, 1, 1.0f }, { 8192, 2, 2, 3e-3f },
    };
    for (const auto & n : shapes) {
        Nodes                      nodes;
        std::vector<ggml_tensor *> parts;
        for (int i = 0; i <= n.n_adds; ++i) {
            parts.push_back(nodes.normal(n.n_values, n.n_tokens, n.deviation));
        }
        ggml_tensor * weights = nodes.normal(n.n_values);
        ggml_tensor * sum     = ggml_add(nodes.ctx, parts[0], parts[1]);
        ggml_set_name(sum, "one");
        sum = n.n_adds == 2 ? ggml_add(nodes.ctx, sum, parts[2]) : sum;
        nodes.result(ggml_mul(nodes.ctx, ggml_rms_norm(nodes.ctx, sum, EPS), weights));
        nodes.results.push_back(sum);

        Doubles want(n.n_values * n.n_tokens), total(n.n_values * n.n_tokens);
        for (int64_t t = 0; t < n.n_tokens; ++t) {
            double square = 0.0;
            for (int64_t i = t * n.n_values; i < (t + 1) * n.n_values; ++i) {
                for (const ggml_tensor * part : parts) {
                    total[i] += nodes.values(part)[i];
                }
                square += total[i] * total[i];
            }
            for (int64_t i = 0; i < n.n_values; ++i) {
                const int64_t at = t * n.n_values + i;
                want[at]         = total[at] / std::sqrt(square / n.n_values + EPS) * nodes.values(weights)[i];
            }
        }
        test_one(text("norm of %d sums of %d values", n.n_adds, (int) n.n_values), nodes, { want, total });
    }
}

// Runs like ADD, RMS_NORM, MUL.
static void test_other_norms() {
    const int64_t n = 64, n_tokens = 3;
    const auto    weighted = [](Nodes & x, ggml_tensor * sum, ggml_tensor * weights = nullptr) {
        ggml_tensor * norm = ggml_rms_norm(x.ctx, sum, EPS);
        return x.result(ggml_mul(x.ctx, norm, weights ? weights : x.normal(sum->ne[0])));
    };
    const auto named = [](ggml_tensor * t) { return ggml_set_name(t, "one"); };

    test_apart("marked", [&](Nodes & x) {
        ggml_tensor * sum = ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens));
        ggml_op_set_mark(sum, GGML_OP_MARK_UNFUSED);
        weighted(x, sum);
    });
    test_apart("weights first", [&](Nodes & x) {
        ggml_tensor * sum = ggml_add(x.ctx, x.normal(n), x.normal(n));
        x.result(ggml_mul(x.ctx, x.normal(n), ggml_rms_norm(x.ctx, sum, EPS)));
    });
    test_apart("the norm of another tensor", [&](Nodes & x) {
        x.result(ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens)));
        weighted(x, x.normal(n, n_tokens));
    });
    test_apart("the product of another tensor", [&](Nodes & x) {
        ggml_tensor * sum = x.result(ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens)));
        x.result(ggml_rms_norm(x.ctx, sum, EPS));
        x.result(ggml_mul(x.ctx, sum, x.normal(n)));
    });
    test_apart("one row added to all",
               [&](Nodes & x) { weighted(x, ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n))); });
    test_apart("rows with gaps", [&](Nodes & x) {
        ggml_tensor * wide = x.normal(2 * n, n_tokens);
        weighted(x, ggml_add(x.ctx, x.normal(n, n_tokens), ggml_view_2d(x.ctx, wide, n, n_tokens, wide->nb[1], 0)));
    });
    test_apart("a length that is not a multiple of 4",
               [&](Nodes & x) { weighted(x, ggml_add(x.ctx, x.normal(66, n_tokens), x.normal(66, n_tokens))); });
    test_apart("weights for each row", [&](Nodes & x) {
        weighted(x, ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens)), x.normal(n, n_tokens));
    });
    test_apart("one weight", [&](Nodes & x) {
        weighted(x, ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens)), x.normal(1));
    });
    test_apart("the norm is read", [&](Nodes & x) {
        ggml_tensor * product = weighted(x, ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens)));
        x.result(ggml_scale(x.ctx, product->src[0], 1.0f));
    });
    test_apart("the norm is an output", [&](Nodes & x) {
        ggml_set_output(weighted(x, ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens)))->src[0]);
    });
    test_apart(
        "the first of two sums is read",
        [&](Nodes & x) {
            ggml_tensor * first = ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens));
            weighted(x, named(ggml_add(x.ctx, first, x.normal(n, n_tokens))));
            x.result(ggml_scale(x.ctx, first, 1.0f));
        },
        1);
    test_apart(
        "the first of two sums is the second operand",
        [&](Nodes & x) {
            ggml_tensor * first = ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens));
            weighted(x, named(ggml_add(x.ctx, x.normal(n, n_tokens), first)));
        },
        1);
    // one dispatch, which depends on the one before it by its second sum only
    test_apart(
        "the second operand is computed",
        [&](Nodes & x) {
            ggml_tensor * last = ggml_scale(x.ctx, x.normal(n, n_tokens), 2.0f);
            x.add(last);
            weighted(x, ggml_add(x.ctx, named(ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens))), last));
        },
        1);
    test_apart(
        "memory is reused",
        [&](Nodes & x) {
            ggml_tensor * old = x.normal(n, n_tokens);
            x.add(ggml_scale(x.ctx, old, 1.0f));
            ggml_tensor * first = named(ggml_add(x.ctx, x.normal(n, n_tokens), x.normal(n, n_tokens)));
            ggml_tensor * sum   = ggml_add(x.ctx, first, x.normal(n, n_tokens));
            x.moved             = { { sum, old } };
            weighted(x, sum);
        },
        1);
}

int main(int argc, char ** argv) {
    CHECK(argc == 2);
    cpu = cpu_backend();
    CHECK(ggml_backend_load(argv[1]));
    metal = ggml_backend_dev_init(ggml_backend_dev_by_name("MTL0"), nullptr);
    CHECK(metal);
    test_routers();
    test_norms();
    test_other_norms();
    ggml_backend_free(metal);
    ggml_backend_free(cpu);
    printf("%d as one dispatch\n", n_one);
    return report();
}
