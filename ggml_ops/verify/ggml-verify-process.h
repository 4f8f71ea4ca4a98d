#pragma once

// A child process with a time limit.

#include <string>
#include <vector>

struct ggml_verify_process {
    std::string output;             // what it wrote to standard output
    bool        timed_out = false;  // it was killed
    std::string problem;            // why it ended without success, or could not be started; otherwise empty
};

// Runs a program to its end, with no input, standard error discarded, and at most this long.
ggml_verify_process ggml_verify_run(const std::vector<std::string> & command, double seconds);

// The path of kimi-verify: next to this library, or in ../bin; empty if there is none.
std::string ggml_verify_program();

// The path of the executable or shared library that holds this function; empty if unknown.
std::string ggml_verify_library_of(const void * function);

// The version of the driver, as far as it can be told without its interface.
std::string ggml_verify_driver();
