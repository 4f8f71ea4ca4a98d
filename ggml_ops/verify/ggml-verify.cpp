#include "ggml-verify.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-op-marks.h"
#include "ggml-verify-cache.h"
#include "ggml-verify-process.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <vector>

static constexpr double SECONDS      = 30;
static constexpr double MOST_SECONDS = 86400;

const char * ggml_verify_part_name(ggml_verify_part part) {
    static const char * const names[GGML_VERIFY_N_PARTS] = {
        "KDA_CONV",    "KDA_SCAN",    "elided state copies",   "absorbed latent attention",
        "LATENT_ATTN", "fused nodes", "matmuls of one column",
    };
    return names[part];
}

const char * ggml_verify_state_name(ggml_verify_state state) {
    static const char * const names[GGML_VERIFY_N_STATES] = { "not checked", "absent", "passed",
                                                              "WRONG",       "HANGS",  "CRASHES" };
    return names[state];
}

bool ggml_verify_has_matvec(ggml_backend_dev_t dev) {
    const auto has = (ggml_backend_has_matvec_t) ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev),
                                                                                   GGML_BACKEND_HAS_MATVEC);
    return has && has(dev);
}

static bool is_used(const ggml_verify_result & result) {
    return result.state == GGML_VERIFY_ABSENT || result.state == GGML_VERIFY_PASSED;
}

std::string ggml_verify_reason(const ggml_verify_report & report, ggml_verify_part part) {
    const ggml_verify_result & result = report.results[part];
    char                       text[64];
    switch (result.state) {
    case GGML_VERIFY_WRONG:
        snprintf(text, sizeof(text), "NMSE %.2g, bound %.2g", result.nmse, result.bound);
        return std::string(text) + " (" + result.name + ")";
    case GGML_VERIFY_HANGS:
        return "no result in time (" + result.name + ")";
    case GGML_VERIFY_CRASHES:
        return "the process ended (" + result.name + ")";
    case GGML_VERIFY_NOT_CHECKED:
        return "not checked: " + (result.name.empty() ? report.problem : result.name);
    default:
        return "";
    }
}

// What is not used on which device, by all contexts of the process.
namespace {
struct Refused {
    std::atomic<bool>                      any{ false };
    std::mutex                             mutex;
    std::map<ggml_backend_dev_t, uint32_t> parts;  // bits

    bool contains(ggml_backend_dev_t dev, ggml_verify_part part) {
        if (!any) {
            return false;
        }
        std::lock_guard<std::mutex> lock(mutex);
        const auto                  found = parts.find(dev);
        return found != parts.end() && (found->second >> part & 1) != 0;
    }

    void set(ggml_backend_dev_t dev, const ggml_verify_report & report) {
        std::lock_guard<std::mutex> lock(mutex);
        uint32_t &                  bits = parts[dev];
        bits                             = 0;
        for (int part = 0; part < GGML_VERIFY_N_PARTS; ++part) {
            bits |= (uint32_t) !is_used(report.results[part]) << part;
        }
        any = any || bits != 0;
    }
};
}  // namespace

static Refused refused;

bool ggml_verify_allows(ggml_backend_dev_t dev, const ggml_tensor * node) {
    switch (node->op) {
    case GGML_OP_KDA_CONV:
        return !refused.contains(dev, GGML_VERIFY_KDA_CONV);
    case GGML_OP_KDA_SCAN:
        return !refused.contains(dev, GGML_VERIFY_KDA_SCAN);
    case GGML_OP_LATENT_ATTN:
        return !refused.contains(dev, GGML_VERIFY_LATENT_ATTN);
    default:
        return true;
    }
}

static int marks_of(ggml_backend_dev_t dev, const ggml_tensor * node) {
    int        marks = 0;
    const auto add   = [&](ggml_verify_part part, bool concerned, ggml_op_mark mark) {
        marks |= concerned && refused.contains(dev, part) ? mark : 0;
    };
    const bool kda    = node->op == GGML_OP_KDA_CONV || node->op == GGML_OP_KDA_SCAN;
    const bool matmul = node->op == GGML_OP_MUL_MAT || node->op == GGML_OP_MUL_MAT_ID;
    add(GGML_VERIFY_ABSORBED, node->op == GGML_OP_FLASH_ATTN_EXT, GGML_OP_MARK_UPSTREAM);
    add(GGML_VERIFY_STATE_COPY, kda, GGML_OP_MARK_KEEP_COPY);
    add(GGML_VERIFY_FUSED, ggml_op_starts_fused_run(node->op), GGML_OP_MARK_UNFUSED);
    add(GGML_VERIFY_MATVEC, matmul, GGML_OP_MARK_UPSTREAM);
    return marks;
}

ggml_tensor ggml_verify_marked(ggml_backend_dev_t dev, const ggml_tensor * node) {
    ggml_tensor copy = *node;
    copy.op_params[GGML_OP_MARK_PARAM] |= marks_of(dev, node);
    return copy;
}

void ggml_verify_mark(ggml_backend_dev_t dev, ggml_cgraph * graph) {
    for (int i = 0; refused.any && i < graph->n_nodes; ++i) {
        graph->nodes[i]->op_params[GGML_OP_MARK_PARAM] |= marks_of(dev, graph->nodes[i]);
    }
}

static double seconds_allowed() {
    const char * text = getenv("KIMI_VERIFY_SECONDS");
    if (!text || !*text) {
        return SECONDS;
    }
    char *       end     = nullptr;
    const double seconds = strtod(text, &end);
    if (*end || !(seconds >= 0 && seconds <= MOST_SECONDS)) {
        GGML_LOG_WARN("verify: KIMI_VERIFY_SECONDS is '%s', expected a number from 0 to %g: %g is used\n", text,
                      MOST_SECONDS, SECONDS);
        return SECONDS;
    }
    return seconds;
}

// The library with the kernels, and a hash that changes with it, with ggml's common code, with the CPU backends, whose
// results are the expected ones, and with the program.
static std::string build_of(const std::string & library) {
    const std::string     common = ggml_verify_library_of((const void *) &ggml_verify_device);
    std::set<std::string> paths  = { library, common, ggml_verify_program() };
    std::error_code       error;
    const auto            folder = std::filesystem::path(common).parent_path();
    for (const auto & entry : std::filesystem::directory_iterator(folder, error)) {
        if (entry.path().filename().string().rfind("libggml-cpu", 0) == 0) {
            paths.insert(entry.path().string());
        }
    }
    std::string files;
    for (const std::string & path : paths) {
        const auto size = std::filesystem::file_size(path, error);
        const auto time = std::filesystem::last_write_time(path, error).time_since_epoch().count();
        files += path + "\t" + std::to_string(size) + "\t" + std::to_string((int64_t) time) + "\n";
    }
    return library + ", " + ggml_verify_hash(files);
}

// Reads the results of one process and removes the parts with a result from `todo`. Returns whether another process
// should check the rest.
static bool read_output(const ggml_verify_process & ended, std::vector<int> & todo, ggml_verify_report & report) {
    bool               done    = false;
    int                running = -1;
    std::istringstream lines(ended.output);
    const auto         decided = [&](int part) { todo.erase(std::find(todo.begin(), todo.end(), part)); };
    const auto         fail    = [&](const std::string & problem) {
        report.problem = problem;
        for (const int part : todo) {
            report.results[part].name.clear();  // of the case that was running
        }
        return false;
    };
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::string        kind, name, text;
        std::getline(words, kind, '\t');
        std::getline(words, name, '\t');
        std::getline(words, text, '\t');
        const auto part = std::find_if(
            todo.begin(), todo.end(), [&](int each) { return name == ggml_verify_part_name((ggml_verify_part) each); });
        if (kind == "case" && part != todo.end()) {
            running                      = *part;
            report.results[running].name = text;
        } else if (ggml_verify_from_line(line, report) && part != todo.end()) {
            decided(*part);
            running = -1;
        } else if (kind == "problem") {
            return fail(name);
        } else if (kind == "started") {
            report.start_seconds += atof(name.c_str());
        } else if (kind == "checked") {
            report.check_seconds += atof(name.c_str());
            done = true;
        }
    }
    if (done) {
        return false;
    }
    if (ended.stopped) {
        return fail("kimi-verify was stopped from outside: " + ended.problem);
    }
    if (running >= 0) {
        report.results[running].state = ended.timed_out ? GGML_VERIFY_HANGS : GGML_VERIFY_CRASHES;
        decided(running);
        if (!ended.problem.empty() && !ended.timed_out) {
            report.results[running].name += ", " + ended.problem;
        }
    }
    if (running < 0) {
        return fail(ended.timed_out ? "the device did not start in time" : "kimi-verify ended: " + ended.problem);
    }
    return !todo.empty();
}

static void check(ggml_backend_dev_t dev, const std::string & library, double seconds, ggml_verify_report & report) {
    const std::string program = ggml_verify_program();
    if (program.empty()) {
        report.problem = "the program kimi-verify is not next to ggml's libraries";
        return;
    }
    GGML_LOG_INFO("verify: checking the operators on %s, once for this driver and build (at most %g s)\n",
                  report.device.c_str(), seconds);
    using Clock    = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::duration<double>(seconds);

    std::vector<int> todo;
    for (int part = 0; part < GGML_VERIFY_N_PARTS; ++part) {
        todo.push_back(part);
    }
    for (bool go_on = true; go_on;) {
        const double left = std::chrono::duration<double>(end - Clock::now()).count();
        if (left <= 0) {
            for (const int part : todo) {
                report.results[part].name = "the time was used up";
            }
            return;
        }
        std::vector<std::string> command = { program,
                                             "--check",
                                             ggml_backend_dev_name(dev),
                                             ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)),
                                             library,
                                             std::to_string((int) seconds + 1) };
        for (const int part : todo) {
            command.push_back(ggml_verify_part_name((ggml_verify_part) part));
        }
        go_on = read_output(ggml_verify_run(command, left), todo, report);
    }
}

static void log_report(const char * name, const ggml_verify_report & report, bool checked) {
    int n_used = 0;
    int n_here = 0;
    for (int part = 0; part < GGML_VERIFY_N_PARTS; ++part) {
        const ggml_verify_result & result = report.results[part];
        n_used += result.state == GGML_VERIFY_PASSED;
        n_here += result.state != GGML_VERIFY_ABSENT;
        if (!is_used(result)) {
            GGML_LOG_WARN("verify: %s: not used: %s: %s\n", name, ggml_verify_part_name((ggml_verify_part) part),
                          ggml_verify_reason(report, (ggml_verify_part) part).c_str());
        }
    }
    if (checked) {
        GGML_LOG_INFO("verify: %s: %d of %d passed in %.2f s, after %.2f s of start-up\n", name, n_used, n_here,
                      report.check_seconds, report.start_seconds);
    }
}

const ggml_verify_report * ggml_verify_device(ggml_backend_dev_t dev, bool again) {
    const auto   type    = ggml_backend_dev_type(dev);
    const bool   is_gpu  = type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
    const double allowed = seconds_allowed();
    const double seconds = again && allowed <= 0 ? SECONDS : allowed;
    if (!is_gpu || strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev)), "RPC") == 0 || seconds <= 0) {
        return nullptr;
    }
    static std::mutex                                                        mutex;
    static std::map<ggml_backend_dev_t, std::unique_ptr<ggml_verify_report>> known;
    std::lock_guard<std::mutex>                                              lock(mutex);
    std::unique_ptr<ggml_verify_report> &                                    report = known[dev];
    if (report && !again) {
        return report.get();
    }
    const std::string library = ggml_verify_library_of((const void *) dev->iface.get_name);
    report                    = std::make_unique<ggml_verify_report>();
    report->device = std::string(ggml_backend_dev_name(dev)) + " (" + ggml_backend_dev_description(dev) + ")";
    report->driver = ggml_verify_driver();
    report->build  = build_of(library);

    const bool cached = !again && ggml_verify_read(*report);
    if (!cached) {
        check(dev, library, seconds, *report);
        if (report->problem.empty()) {
            ggml_verify_write(*report);
        } else if (again) {
            ggml_verify_forget(*report);  // what an earlier check found may no longer be true
        }
    }
    log_report(ggml_backend_dev_name(dev), *report, !cached && report->problem.empty());
    refused.set(dev, *report);
    return report.get();
}
