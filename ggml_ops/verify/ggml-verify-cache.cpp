#include "ggml-verify-cache.h"

#include "ggml-impl.h"

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <sstream>
#include <vector>

namespace fs = std::filesystem;

static const std::string FORMAT = "kimi-verify 1\n";

static std::vector<std::string> split(const std::string & text, char by) {
    std::vector<std::string> parts;
    std::istringstream       stream(text);
    for (std::string part; std::getline(stream, part, by);) {
        parts.push_back(part);
    }
    return parts;
}

static std::string number(double x) {
    char text[32];
    snprintf(text, sizeof(text), "%.3g", x);
    return text;
}

std::string ggml_verify_to_line(ggml_verify_part part, const ggml_verify_result & result) {
    return std::string("result\t") + ggml_verify_part_name(part) + "\t" + ggml_verify_state_name(result.state) + "\t" +
           number(result.nmse) + "\t" + number(result.bound) + "\t" + result.name + "\n";
}

bool ggml_verify_from_line(const std::string & line, ggml_verify_report & report) {
    std::vector<std::string> words = split(line, '\t');
    words.resize(std::max<size_t>(words.size(), 6));  // the name of the case may be empty
    if (words[0] != "result" || words.size() > 6) {
        return false;
    }
    for (int part = 0; part < GGML_VERIFY_N_PARTS; ++part) {
        for (int state = 0; state < GGML_VERIFY_N_STATES; ++state) {
            if (words[1] == ggml_verify_part_name((ggml_verify_part) part) &&
                words[2] == ggml_verify_state_name((ggml_verify_state) state)) {
                report.results[part] = { (ggml_verify_state) state, strtod(words[3].c_str(), nullptr),
                                         strtod(words[4].c_str(), nullptr), words[5] };
                return true;
            }
        }
    }
    return false;
}

std::string ggml_verify_hash(const std::string & text) {
    uint64_t hash = 0xcbf29ce484222325ull;
    for (const char c : text) {
        hash = (hash ^ (uint8_t) c) * 0x100000001b3ull;
    }
    char hex[17];
    snprintf(hex, sizeof(hex), "%016" PRIx64, hash);
    return hex;
}

static std::string key_of(const ggml_verify_report & report) {
    return FORMAT + "device\t" + report.device + "\ndriver\t" + report.driver + "\nbuild\t" + report.build + "\n";
}

// In the cache folder of kimi-gguf; empty if the user has no home folder.
static fs::path folder() {
    const auto value = [](const char * name) -> std::string {
        const char * text = getenv(name);
        return text ? text : "";
    };
    const auto expanded = [&](const char * name) {  // a leading ~ is the home folder
        const std::string path = value(name);
        return path == "~" || path.rfind("~/", 0) == 0 ? value("HOME") + path.substr(1) : path;
    };
    if (!value("KIMI_GGUF_CACHE").empty()) {
        return fs::path(expanded("KIMI_GGUF_CACHE")) / "devices";
    }
    if (!value("XDG_CACHE_HOME").empty()) {
        return fs::path(expanded("XDG_CACHE_HOME")) / "kimi-gguf" / "devices";
    }
    return value("HOME").empty() ? fs::path() : fs::path(value("HOME")) / ".cache" / "kimi-gguf" / "devices";
}

// Hanging and crashing can be due to what else ran on the device, so these results count for a day.
static bool is_outdated(const ggml_verify_report & report, const fs::path & path) {
    const bool checked =
        std::all_of(std::begin(report.results), std::end(report.results), [](const ggml_verify_result & result) {
            return result.state == GGML_VERIFY_PASSED || result.state == GGML_VERIFY_WRONG ||
                   result.state == GGML_VERIFY_ABSENT;
        });
    std::error_code error;
    const auto      now     = fs::file_time_type::clock::now();
    const auto      written = fs::last_write_time(path, error);  // may be after now: the clock was set back
    return !checked && (written > now || written < now - std::chrono::hours(24));
}

void ggml_verify_forget(const ggml_verify_report & report) {
    if (!folder().empty()) {
        std::error_code ignored;
        fs::remove(folder() / ggml_verify_hash(key_of(report)), ignored);
    }
}

bool ggml_verify_read(ggml_verify_report & report) {
    if (folder().empty()) {
        return false;
    }
    const std::string key  = key_of(report);
    const fs::path    path = folder() / ggml_verify_hash(key);
    std::ifstream     file(path, std::ios::binary);
    std::stringstream content;
    content << file.rdbuf();
    const std::string text = content.str();
    const size_t      end  = text.rfind("checksum\t");
    if (!file || end == std::string::npos ||
        text.substr(end) != "checksum\t" + ggml_verify_hash(text.substr(0, end)) + "\n" ||
        text.compare(0, key.size(), key) != 0) {
        return false;
    }
    ggml_verify_report cached  = report;
    int                n_found = 0;
    for (const std::string & line : split(text.substr(key.size(), end - key.size()), '\n')) {
        n_found += ggml_verify_from_line(line, cached);
    }
    if (n_found != GGML_VERIFY_N_PARTS || is_outdated(cached, path)) {
        return false;
    }
    report = cached;
    return true;
}

void ggml_verify_write(const ggml_verify_report & report) {
    if (folder().empty()) {
        return;
    }
    std::string text = key_of(report);
    for (int part = 0; part < GGML_VERIFY_N_PARTS; ++part) {
        text += ggml_verify_to_line((ggml_verify_part) part, report.results[part]);
    }
    text += "checksum\t" + ggml_verify_hash(text) + "\n";

    std::error_code error;
    fs::create_directories(folder(), error);
    const fs::path path    = folder() / ggml_verify_hash(key_of(report));
    const fs::path scratch = path.string() + "." + ggml_verify_hash(std::to_string(std::random_device()()));
    if (!(std::ofstream(scratch, std::ios::binary) << text << std::flush)) {
        error = std::make_error_code(std::errc::io_error);
    } else {
        fs::rename(scratch, path, error);
    }
    if (error) {
        std::error_code ignored;
        fs::remove(scratch, ignored);
        GGML_LOG_WARN("verify: %s cannot be written (%s): the check is repeated by each process\n",
                      path.string().c_str(), error.message().c_str());
    }
}
