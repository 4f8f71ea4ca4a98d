// Compares the project's operators on a device with the CPU.
//
//   kimi-verify                        checks all GPUs again, whatever KIMI_VERIFY_SECONDS says, and prints lines of
//                                      "device", "driver", "build", "problem" or "started" and "checked", and "result",
//                                      and their fields; exit status 1 if an operator is not used
//   kimi-verify --check DEVICE REGISTRY LIBRARY SECONDS PART...
//                                      the process that ggml_verify_device starts; it starts no other process. It prints
//                                      lines of "started", "case", "result", "checked" or "problem" and their fields

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-op-marks.h"
#include "ggml-verify-cache.h"
#include "ggml-verify.h"
#include "verify-cases.h"

#ifndef _WIN32
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <thread>

using Clock = std::chrono::steady_clock;

static double seconds_since(Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
}

// What a range holds, piece by piece.
static Floats read(const Range & range) {
    Floats span((range.n_pieces - 1) * range.step + range.n);
    ggml_backend_tensor_get(range.tensor, span.data(), range.first * sizeof(float), span.size() * sizeof(float));
    Floats values;
    for (int64_t piece = 0; piece < range.n_pieces; ++piece) {
        const auto begin = span.begin() + piece * range.step;
        values.insert(values.end(), begin, begin + range.n);
    }
    return values;
}

// What the memory of a case contains at first: bytes of a NaN, so that reading a value that was not computed is found.
static constexpr uint8_t FILLING = 0xff;

static bool is_filling(const Floats & values) {
    const char * bytes = (const char *) values.data();
    return std::all_of(bytes, bytes + values.size() * sizeof(float), [](char x) { return (uint8_t) x == FILLING; });
}

struct Computed {
    bool                supported = false;
    std::vector<Floats> results;
    bool                copy_elided = false;
};

// Computes a case with more marks on all nodes (nothing else is in that parameter of these).
static Computed compute(const Case & test_case, ggml_backend_t backend, int marks) {
    const std::unique_ptr<ggml_context, decltype(&ggml_free)> ctx(
        ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }), ggml_free);
    Inputs        inputs(ctx.get());
    const Built   built = test_case.build(inputs);
    ggml_cgraph * graph = ggml_new_graph(ctx.get());
    for (ggml_tensor * node : built.nodes) {
        ggml_build_forward_expand(graph, node);
    }
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {  // the memory that a node needs depends on its marks
        ggml_graph_node(graph, i)->op_params[GGML_OP_MARK_PARAM] |= marks;
    }
    const std::unique_ptr<ggml_backend_buffer, decltype(&ggml_backend_buffer_free)> buffer(
        ggml_backend_alloc_ctx_tensors(ctx.get(), backend), ggml_backend_buffer_free);
    if (!buffer) {
        throw std::runtime_error("there is not enough memory on the device");
    }
    if (test_case.weights) {
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        if (!ggml_backend_supports_op(backend, ggml_graph_node(graph, i))) {
            return {};
        }
    }
    ggml_backend_buffer_clear(buffer.get(), FILLING);
    inputs.write();
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error(std::string(ggml_backend_name(backend)) + " did not compute: " + test_case.name);
    }
    Computed computed;
    computed.supported = true;
    for (const Range & range : built.results) {
        computed.results.push_back(read(range));
    }
    for (const Range & range : built.not_kept) {
        computed.copy_elided = is_filling(read(range));
    }
    return computed;
}

// The largest NMSE of the results. NaN is expected where the CPU has it.
static double error_of(const std::vector<Floats> & got, const std::vector<Floats> & expected) {
    double most = 0;
    for (size_t r = 0; r < expected.size(); ++r) {
        double error = 0, power = 1e-30;
        for (size_t i = 0; i < expected[r].size(); ++i) {
            const double x = got[r][i], y = expected[r][i];
            if (std::isnan(y) && std::isnan(x)) {
                continue;
            }
            error += (x - y) * (x - y);
            power += y * y;
        }
        const double nmse = error / power;
        most              = std::isfinite(nmse) ? std::max(most, nmse) : std::numeric_limits<double>::infinity();
    }
    return most;
}

static bool same_bits(const std::vector<Floats> & x, const std::vector<Floats> & y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), [](const Floats & a, const Floats & b) {
        return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    });
}

// The mark that makes a device compute a part's nodes without the part; 0 for operators, which are nodes of their own.
static int mark_without(ggml_verify_part part) {
    switch (part) {
    case GGML_VERIFY_ABSORBED:
    case GGML_VERIFY_MATVEC:
        return GGML_OP_MARK_UPSTREAM;
    case GGML_VERIFY_FUSED:
        return GGML_OP_MARK_UNFUSED;
    default:
        return 0;
    }
}

// The file of Metal kernels that a part needs, without .metal; nullptr for a part that Metal does not have.
static const char * library_of(ggml_verify_part part) {
    switch (part) {
    case GGML_VERIFY_KDA_CONV:
    case GGML_VERIFY_KDA_SCAN:
    case GGML_VERIFY_STATE_COPY:
        return "kda";
    case GGML_VERIFY_ABSORBED:
        return "fa_latent";
    case GGML_VERIFY_FUSED:
        return "fuse";
    default:
        return nullptr;
    }
}

// Whether the device's compiler accepted the kernels of a part. Backends other than Metal compile them in advance.
static bool has_kernels(ggml_verify_part part, ggml_backend_t backend) {
    ggml_backend_dev_t dev = ggml_backend_get_device(backend);
    const auto         has = (bool (*)(ggml_backend_dev_t, const char *)) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(dev), "ggml_backend_metal_library_has");
    return !has || !library_of(part) || has(dev, library_of(part));
}

// The threads that a kernel which was just refused allows on a Metal device; 0 if none was refused.
static int threads_of_refused_kernel(ggml_backend_t backend) {
    const auto take = (int (*)()) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(ggml_backend_get_device(backend)), "ggml_backend_metal_take_small_kernel");
    return take ? take() : 0;
}

static ggml_verify_result check(ggml_verify_part part, ggml_backend_t device, ggml_backend_t cpu) {
    if (!has_kernels(part, device)) {
        return { GGML_VERIFY_NOT_CHECKED, 0, 0, "the device's compiler refused its kernels" };
    }
    // operators are checked without the elision of the copy after them, which is a part of its own
    const bool         is_operator = part == GGML_VERIFY_KDA_CONV || part == GGML_VERIFY_KDA_SCAN;
    const int          without     = mark_without(part);
    ggml_verify_result worst;
    worst.state = GGML_VERIFY_ABSENT;
    if (part == GGML_VERIFY_MATVEC && !ggml_verify_has_matvec(ggml_backend_get_device(device))) {
        return worst;
    }
    bool used = part != GGML_VERIFY_STATE_COPY;
    for (const Case & test_case : cases_of(part)) {
        printf("case\t%s\t%s\n", ggml_verify_part_name(part), test_case.name.c_str());
        fflush(stdout);
        const Computed got = compute(test_case, device, is_operator ? GGML_OP_MARK_KEEP_COPY : 0);
        if (!got.supported) {
            continue;
        }
        // the device did not use the part if the bits are the same without it
        if (without && same_bits(got.results, compute(test_case, device, without).results)) {
            continue;
        }
        const Computed expected = compute(test_case, cpu, GGML_OP_MARK_KEEP_COPY | GGML_OP_MARK_UNFUSED);
        if (!expected.supported) {
            throw std::runtime_error("the CPU does not have: " + test_case.name);
        }
        used              = used || got.copy_elided;
        const double nmse = error_of(got.results, expected.results);
        if (worst.state == GGML_VERIFY_ABSENT || nmse / test_case.bound > worst.nmse / worst.bound) {
            worst = { nmse <= test_case.bound ? GGML_VERIFY_PASSED : GGML_VERIFY_WRONG, nmse, test_case.bound,
                      test_case.name };
        }
    }
    if (!used && worst.state == GGML_VERIFY_PASSED) {
        worst       = {};
        worst.state = GGML_VERIFY_ABSENT;
    }
    const int n_threads = threads_of_refused_kernel(device);
    if (worst.state == GGML_VERIFY_ABSENT && n_threads > 0) {
        return { GGML_VERIFY_NOT_CHECKED, 0, 0,
                 "its kernel allows only " + std::to_string(n_threads) + " threads on this device" };
    }
    return worst;
}

static ggml_backend_dev_t find(const char * device, const char * registry) {
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t dev = ggml_backend_dev_get(i);
        if (strcmp(ggml_backend_dev_name(dev), device) == 0 &&
            strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), registry) == 0) {
            return dev;
        }
    }
    return nullptr;
}

static ggml_backend_t start(ggml_backend_dev_t dev, const char * name) {
    ggml_backend_t backend = dev ? ggml_backend_dev_init(dev, nullptr) : nullptr;
    if (backend == nullptr) {
        throw std::runtime_error(std::string(name) + " cannot be started");
    }
    return backend;
}

static ggml_backend_t start_cpu() {
    ggml_backend_dev_t dev           = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_t     backend       = start(dev, "the CPU");
    const auto         set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
        ggml_backend_dev_backend_reg(dev), "ggml_backend_set_n_threads");
    set_n_threads(backend, std::clamp((int) std::thread::hardware_concurrency() / 2, 1, 4));
    return backend;
}

static int check_device(int argc, char ** argv) {
    const auto begin = Clock::now();
#ifndef _WIN32
    alarm(atoi(argv[5]) + 1);  // ends this process even if the process that started it has ended
#endif
    ggml_backend_load(argv[4]);  // first, so that it is the one that is found; fails if it is linked to this program
    ggml_backend_load_all();
    try {
        ggml_backend_t device = start(find(argv[2], argv[3]), argv[2]);
        ggml_backend_t cpu    = start_cpu();
        printf("started\t%.3f\n", seconds_since(begin));
        const auto started = Clock::now();
        for (int part = 0; part < GGML_VERIFY_N_PARTS; ++part) {
            const char * name = ggml_verify_part_name((ggml_verify_part) part);
            if (std::find_if(argv + 6, argv + argc, [&](const char * x) { return !strcmp(x, name); }) != argv + argc) {
                const ggml_verify_result result = check((ggml_verify_part) part, device, cpu);
                printf("%s", ggml_verify_to_line((ggml_verify_part) part, result).c_str());
                fflush(stdout);
            }
        }
        printf("checked\t%.3f\n", seconds_since(started));
        fflush(stdout);  // drivers can end the process later
        ggml_backend_free(cpu);
        ggml_backend_free(device);
    } catch (const std::exception & error) {
        printf("problem\t%s\n", error.what());
        fflush(stdout);
        return 1;
    }
    return 0;
}

// Returns whether all of the operators that the device has are used.
static bool print_report(const ggml_verify_report & report) {
    printf("device\t%s\ndriver\t%s\nbuild\t%s\n", report.device.c_str(), report.driver.c_str(), report.build.c_str());
    if (report.problem.empty()) {
        printf("started\t%.3f\nchecked\t%.3f\n", report.start_seconds, report.check_seconds);
    } else {
        printf("problem\t%s\n", report.problem.c_str());
    }
    bool all = true;
    for (int i = 0; i < GGML_VERIFY_N_PARTS; ++i) {
        const auto part = (ggml_verify_part) i;
        printf("%s", ggml_verify_to_line(part, report.results[part]).c_str());
        all = all && ggml_verify_reason(report, part).empty();
    }
    return all;
}

static int check_all() {
    ggml_backend_load_all();
    int  n_checked = 0;
    bool all       = true;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        if (const ggml_verify_report * report = ggml_verify_device(ggml_backend_dev_get(i), true)) {
            n_checked++;
            all &= print_report(*report);
        }
    }
    if (n_checked == 0) {
        printf("this build finds no GPU: no device needs the check\n");
    }
    return all ? 0 : 1;
}

int main(int argc, char ** argv) {
    return argc > 6 && strcmp(argv[1], "--check") == 0 ? check_device(argc, argv) : check_all();
}
