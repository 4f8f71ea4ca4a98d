#pragma once

// A child process with a time limit.

#include <string>
#include <vector>

struct ggml_verify_process {
    std::string output;             // what it wrote to standard output
    bool        timed_out = false;  // it was killed
    bool        stopped   = false;  // by a signal that a user, a service manager or a lack of memory sends
    std::string problem;            // why it failed or could not be started; otherwise empty
};

// Runs a program without input until it ends or so many seconds have passed. Its standard error is discarded. It is in a
// process group of its own, so that Ctrl-C does not reach it.
ggml_verify_process ggml_verify_run(const std::vector<std::string> & command, double seconds);

// The path of kimi-verify: next to this library, or in ../bin; empty if there is none.
std::string ggml_verify_program();

// The path of the executable or shared library that holds this function; empty if unknown.
std::string ggml_verify_library_of(const void * function);

// The versions of the system and of the driver, as far as they are known without calling the driver, and the environment
// variables that change what the driver and ggml's backends do.
std::string ggml_verify_driver();
