#pragma once

#include <string>
#include <vector>

// The pieces that byte-pair merging works within, for the pre-tokenizer `kimi-k2`, in GPT-2's byte spelling.
//
// text: UTF-8. Ill-formed bytes count as U+FFFD, one for each maximal subpart (Unicode 16, section 3.9.6), which
//       is what Python's bytes.decode("utf-8", "replace") hands to the model's own tokenizer.
// Equal to what tiktoken makes of the split pattern; the pieces joined give back the text.
std::vector<std::string> kimi_split(const std::string & text);
