#pragma once

#include <string>
#include <vector>

// Splits text for the pre-tokenizer `kimi-k2`, as tiktoken does for the split pattern. BPE merges only within a piece.
//
// text: UTF-8. Ill-formed bytes count as U+FFFD, one for each maximal subpart (Unicode 16, section 3.9.6), as
//       Python's bytes.decode("utf-8", "replace") passes them to the model's own tokenizer.
// Returns the pieces in GPT-2's byte encoding; joined and decoded they are the text.
std::vector<std::string> kimi_split(const std::string & text);
