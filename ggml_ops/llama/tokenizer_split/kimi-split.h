#pragma once

#include <string>
#include <vector>

// The pieces within which byte-pair merging works, for the pre-tokenizer `kimi-k2`, in GPT-2's byte spelling.
//
// text: UTF-8. Ill-formed bytes count as U+FFFD, one for each maximal subpart (Unicode 16, section 3.9.6), as
//       Python's bytes.decode("utf-8", "replace") passes them to the model's own tokenizer.
// Equal to tiktoken's result for the split pattern; the joined pieces are the text.
std::vector<std::string> kimi_split(const std::string & text);
