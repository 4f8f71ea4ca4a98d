#include "ggml-verify-process.h"

#ifdef _WIN32

// Not done: nothing is checked, so the operators are not used on GPUs.
ggml_verify_process ggml_verify_run(const std::vector<std::string> &, double) {
    return {};
}

std::string ggml_verify_program() {
    return "";
}

std::string ggml_verify_library_of(const void *) {
    return "";
}

std::string ggml_verify_driver() {
    return "";
}

#else

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#ifdef __APPLE__
#include <crt_externs.h>
#include <sys/sysctl.h>
#define environ (*_NSGetEnviron())
#else
extern char ** environ;
#endif

namespace fs = std::filesystem;
using Clock  = std::chrono::steady_clock;

static int milliseconds_until(Clock::time_point end) {
    return (int) std::max<int64_t>(0,
                                   std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count());
}

// A pipe that no other process gets that this program starts: the reader waits until all processes have closed it.
static int open_pipe(int ends[2]) {
#ifdef __APPLE__
    // There is no pipe2. A process that another thread starts between these calls gets the ends.
    if (pipe(ends) != 0) {
        return errno;
    }
    for (int i = 0; i < 2; ++i) {
        fcntl(ends[i], F_SETFD, FD_CLOEXEC);
    }
    return 0;
#else
    return pipe2(ends, O_CLOEXEC) == 0 ? 0 : errno;
#endif
}

// Starts the command with its standard output in a pipe. Returns 0 and the end to read from, or an error number.
static int start(const std::vector<std::string> & command, pid_t & child, int & output) {
    int ends[2];
    if (const int error = open_pipe(ends)) {
        return error;
    }
    std::vector<char *> arguments;
    for (const std::string & word : command) {
        arguments.push_back(const_cast<char *>(word.c_str()));
    }
    arguments.push_back(nullptr);
    std::vector<char *> variables;
    for (char ** variable = environ; *variable; ++variable) {
        variables.push_back(*variable);
    }
    char no_backtrace[] = "GGML_NO_BACKTRACE=1";  // a backtrace takes seconds, and nobody would see it
    variables.push_back(no_backtrace);
    variables.push_back(nullptr);

    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&files, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addopen(&files, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    // the defaults of signals, whatever the program that uses this library has set
    sigset_t all, none;
    sigfillset(&all);
    sigdelset(&all, SIGKILL);
    sigdelset(&all, SIGSTOP);
    sigemptyset(&none);
    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigdefault(&attributes, &all);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setpgroup(&attributes, 0);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETPGROUP);

    const int error = posix_spawn(&child, arguments[0], &files, &attributes, arguments.data(), variables.data());
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&files);
    close(ends[1]);
    if (error != 0) {
        close(ends[0]);
    }
    output = ends[0];
    return error;
}

// Waits up to two seconds for the end of the child: a driver may keep a killed process. Returns whether it ended.
static bool wait_for(pid_t child, int & status) {
    const auto end   = Clock::now() + std::chrono::seconds(2);
    pid_t      ended = 0;
    while ((ended = waitpid(child, &status, WNOHANG)) == 0 && milliseconds_until(end) > 0) {
        usleep(1000);
    }
    return ended == child;
}

// How the child failed.
static void set_problem(int status, ggml_verify_process & result) {
    if (WIFSIGNALED(status)) {
        const int by   = WTERMSIG(status);
        result.problem = std::string("signal ") + strsignal(by);
        result.stopped = by == SIGINT || by == SIGTERM || by == SIGHUP || by == SIGQUIT || by == SIGKILL;
    } else if (WEXITSTATUS(status) != 0) {
        result.problem = "exit status " + std::to_string(WEXITSTATUS(status));
    }
}

ggml_verify_process ggml_verify_run(const std::vector<std::string> & command, double seconds) {
    const auto          end = Clock::now() + std::chrono::milliseconds((int64_t) (1000 * seconds));
    ggml_verify_process result;
    pid_t               child;
    int                 output;
    if (const int error = start(command, child, output)) {
        result.problem = command[0] + ": " + strerror(error);
        return result;
    }
    char    buffer[4096];
    ssize_t n = 1;
    while (n != 0 && !result.timed_out) {
        pollfd    ready   = { output, POLLIN, 0 };
        const int n_ready = poll(&ready, 1, milliseconds_until(end));
        if (n_ready > 0) {
            n = read(output, buffer, sizeof(buffer));
            if (n < 0 && errno != EINTR) {
                break;
            }
            result.output.append(buffer, std::max<ssize_t>(n, 0));
        }
        result.timed_out = n_ready == 0;
    }
    close(output);
    int status = 0;
    if (!result.timed_out && wait_for(child, status)) {
        set_problem(status, result);
    } else {
        kill(child, SIGKILL);  // the output decides
        wait_for(child, status);
    }
    return result;
}

std::string ggml_verify_library_of(const void * function) {
    Dl_info info;
    if (dladdr(function, &info) == 0 || info.dli_fname == nullptr) {
        return "";
    }
    fs::path path = info.dli_fname;
    if (path.is_relative()) {  // the executable, by the name under which it was started
        path = "/proc/self/exe";
    }
    std::error_code error;
    path = fs::canonical(path, error);
    return error ? "" : path.string();
}

std::string ggml_verify_program() {
    const fs::path library = ggml_verify_library_of((const void *) &ggml_verify_run);
    if (library.empty()) {
        return "";
    }
    const fs::path folder = library.parent_path();
    for (const fs::path & path : { folder / "kimi-verify", folder.parent_path() / "bin" / "kimi-verify" }) {
        if (access(path.c_str(), X_OK) == 0) {
            return path.string();
        }
    }
    return "";
}

// Variables that select kernels or devices, such as GGML_METAL_FUSION_DISABLE and CUDA_VISIBLE_DEVICES.
static std::vector<std::string> settings() {
    std::vector<std::string> paths;
    for (char ** variable = environ; *variable; ++variable) {
        std::string text = *variable;
        for (const char * prefix : { "GGML_METAL_", "GGML_CUDA_", "CUDA_", "MTL_" }) {
            if (text.rfind(prefix, 0) == 0) {
                std::replace_if(text.begin(), text.end(), [](char c) { return (unsigned char) c < ' '; }, ' ');
                paths.push_back(text);
            }
        }
    }
    std::sort(paths.begin(), paths.end());
    return paths;
}

std::string ggml_verify_driver() {
    utsname system;
    uname(&system);
    std::string text = std::string(system.sysname) + " " + system.release;
#ifdef __APPLE__
    char   build[64] = "";  // of macOS, whose minor versions can have the same release
    size_t size      = sizeof(build);
    if (sysctlbyname("kern.osversion", build, &size, nullptr, 0) == 0) {
        text += std::string(", ") + build;
    }
#endif
    // NVIDIA's library is named after the driver's version
    if (void * cuda = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD)) {
        text += ", " + fs::path(ggml_verify_library_of(dlsym(cuda, "cuInit"))).filename().string();
        dlclose(cuda);
    }
    std::ifstream module("/sys/module/nvidia/version");
    std::string   version;
    if (module >> version) {
        text += ", nvidia " + version;
    }
    for (const std::string & setting : settings()) {
        text += ", " + setting;
    }
    return text;
}

#endif
