#pragma once

// The results of a check as text, and the file that stores them: devices/HASH in the user's cache folder, with the hash of
// device, driver and build. The file repeats these and ends with a checksum; a file that does not is ignored.

#include "ggml-verify.h"

// FNV-1a in hex. It detects damage, not attacks.
std::string ggml_verify_hash(const std::string & text);

// A line "result NAME STATE NMSE BOUND CASE", separated by tabs.
GGML_API std::string ggml_verify_to_line(ggml_verify_part part, const ggml_verify_result & result);

// Sets the result of the part that the line names. Returns false for any other line.
bool ggml_verify_from_line(const std::string & line, ggml_verify_report & report);

// Reads the results for the report's device, driver and build. Returns false if there are none.
bool ggml_verify_read(ggml_verify_report & report);

// Replaces the file atomically: a process that reads it sees the old file or the new one.
void ggml_verify_write(const ggml_verify_report & report);

// Removes the file with the results for the report's device, driver and build, if there is one.
void ggml_verify_forget(const ggml_verify_report & report);
