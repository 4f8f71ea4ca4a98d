// The exact split on hostile bytes, for sanitizers: random mixtures of all kinds of characters, truncated anywhere.
// Also checks that the pieces spell the text: one character of GPT-2's byte spelling for each byte, three for
// ill-formed ones. The positions of the splits are tested through llama.cpp, in test_patch_tokenizer.py.

#include "kimi-split.h"

#include <cstdio>
#include <random>
#include <string>
#include <vector>

static size_t characters(const std::vector<std::string> & pieces) {
    size_t n = 0;
    for (const std::string & piece : pieces) {
        for (const char c : piece) {
            n += (c & 0xc0) != 0x80;
        }
    }
    return n;
}

int main() {
    std::vector<std::string> well_formed = { "a",      "Z",      "0",          "99",           " ",
                                             "  ",     "\n",     "\r\n",       "\t",           "!",
                                             "'s",     "'LL",    "\u0301",     "\u4e16\u754c", "\u3007",
                                             "\u01c5", "\u02b0", "\u00e9",     "\u0410\u0431", "\u00a0",
                                             "\u200b", "\u2028", "\U0001f600", "\U00030000",   "\U0010ffff",
                                             "\u0378", "\ue000" };
    well_formed.push_back(std::string(1, '\0'));
    well_formed.push_back("a very long run of words and of         blanks");
    const std::vector<std::string> ill_formed = { "\x80",     "\xc3",         "\xe4\xb8", "\xf0\x9f\x98", "\xff",
                                                  "\xc0\x80", "\xed\xa0\x80", "\xfe",     "\xf5",         "\xf0" };
    std::mt19937                   rng(1);
    size_t                         n_bytes = 0;
    for (int i = 0; i < 4000; ++i) {
        const bool  any = i % 2;
        std::string text;
        for (unsigned n = rng() % 60; n > 0; --n) {
            const auto & kind = any && rng() % 4 == 0 ? ill_formed : well_formed;
            text += kind[rng() % kind.size()];
        }
        if (any && !text.empty()) {
            text.resize(rng() % text.size());
        }
        text.shrink_to_fit();
        const size_t n = characters(kimi_split(text));
        if (any ? n < text.size() || n > 3 * text.size() : n != text.size()) {
            printf("FAILED text %d of %zu bytes: %zu characters in its pieces\n", i, text.size(), n);
            return 1;
        }
        n_bytes += text.size();
    }
    printf("%zu bytes split\n", n_bytes);
    return 0;
}
