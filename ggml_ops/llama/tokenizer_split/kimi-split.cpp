// The split pattern of the Kimi K2 family's tokenizer, matched exactly as Rust's regex crate matches it:
//
//   word    1  [\p{Han}]+
//           2  [^\r\n\p{L}\p{N}]? UPPER* LOWER+ (?i:'s|'t|'re|'ve|'m|'ll|'d)?
//           3  [^\r\n\p{L}\p{N}]? UPPER+ LOWER* (?i:'s|'t|'re|'ve|'m|'ll|'d)?
//   number  4  \p{N}{1,3}
//   symbol  5   ?[^\s\p{L}\p{N}]+[\r\n]*
//   blank   6  \s*[\r\n]+
//           7  \s+(?!\S)
//           8  \s+
//
// where UPPER is [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]] and LOWER the same with \p{Ll} for \p{Lu}\p{Lt}.
// The first alternative that matches at a position wins, with the longest repetitions that let it match. Every
// character is matched by one of them, so each text is split without gaps, in one pass: no alternative
// reads past its own run and the next character.

#include "kimi-split.h"

#include "kimi-split-data.h"
#include "unicode.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// A separate namespace: upstream compiles many files as one.
namespace kimi {

constexpr uint32_t REPLACEMENT        = 0xFFFD;
constexpr char     REPLACEMENT_UTF8[] = "\xEF\xBF\xBD";
constexpr uint32_t NUM_CODE_POINTS    = 0x110000;

// The classes of each code point, one byte each.
static std::vector<uint8_t> expand_class_runs() {
    std::vector<uint8_t> classes(NUM_CODE_POINTS);
    const size_t         n_runs = sizeof(KIMI_CLASS_RUNS) / sizeof(KIMI_CLASS_RUNS[0]);
    for (size_t i = 0; i < n_runs; i++) {
        const uint32_t first = KIMI_CLASS_RUNS[i] >> 8;
        const uint32_t end   = i + 1 < n_runs ? KIMI_CLASS_RUNS[i + 1] >> 8 : NUM_CODE_POINTS;
        std::fill(classes.begin() + first, classes.begin() + end, (uint8_t) (KIMI_CLASS_RUNS[i] & 0xFF));
    }
    return classes;
}

// GPT-2's spelling of each byte.
static std::array<std::string, 256> spell_bytes() {
    std::array<std::string, 256> spelling;
    for (size_t byte = 0; byte < spelling.size(); byte++) {
        spelling[byte] = unicode_byte_to_utf8((uint8_t) byte);
    }
    return spelling;
}

// One character of UTF-8, or the maximal subpart of an ill-formed one.
struct utf8_unit {
    uint32_t code_point;
    size_t   length;  // in bytes
    bool     valid;
};

// The unit at `pos` of `text`, according to the table of well-formed byte sequences (Unicode 16, table 3-7).
static utf8_unit decode(const std::string & text, size_t pos) {
    const uint8_t lead = text[pos];
    if (lead < 0x80) {
        return { lead, 1, true };
    }
    size_t   length = 0;
    uint8_t  low    = 0x80;  // bounds of the second byte; they exclude overlong forms, surrogates and > 10FFFF
    uint8_t  high   = 0xBF;
    uint32_t value  = 0;
    if (lead >= 0xC2 && lead <= 0xDF) {
        length = 2;
        value  = lead & 0x1F;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
        length = 3;
        value  = lead & 0x0F;
        low    = lead == 0xE0 ? 0xA0 : low;
        high   = lead == 0xED ? 0x9F : high;
    } else if (lead >= 0xF0 && lead <= 0xF4) {
        length = 4;
        value  = lead & 0x07;
        low    = lead == 0xF0 ? 0x90 : low;
        high   = lead == 0xF4 ? 0x8F : high;
    } else {
        return { REPLACEMENT, 1, false };
    }
    for (size_t i = 1; i < length; i++) {
        const uint8_t byte = pos + i < text.size() ? text[pos + i] : 0;
        if (byte < low || byte > high) {
            return { REPLACEMENT, i, false };
        }
        value = value << 6 | (byte & 0x3F);
        low   = 0x80;
        high  = 0xBF;
    }
    return { value, length, true };
}

// A text as characters, and the alternatives of the pattern on it. Positions count characters. Each alternative
// takes the start position of a piece and returns the end of its match, `pos` itself if there is none.
class character_text {
  public:
    explicit character_text(const std::string & text) {
        static const std::vector<uint8_t> class_table = expand_class_runs();
        utf8.reserve(text.size());
        classes.reserve(text.size());
        starts.reserve(text.size() + 1);
        for (size_t pos = 0; pos < text.size();) {
            const utf8_unit unit = decode(text, pos);
            starts.push_back(utf8.size());
            classes.push_back(class_table[unit.code_point]);
            if (unit.valid) {
                utf8.append(text, pos, unit.length);
            } else {
                utf8.append(REPLACEMENT_UTF8);
            }
            pos += unit.length;
        }
        starts.push_back(utf8.size());
    }

    size_t size() const { return classes.size(); }

    // Returns the end of the piece that starts at `pos` < size().
    size_t piece_end(size_t pos) const {
        using alternative                           = size_t (character_text::*)(size_t) const;
        static constexpr alternative ALTERNATIVES[] = {
            &character_text::han,    &character_text::word,  &character_text::number,
            &character_text::symbol, &character_text::blank,
        };
        for (const alternative match : ALTERNATIVES) {
            const size_t end = (this->*match)(pos);
            if (end > pos) {
                return end;
            }
        }
        return pos + 1;  // unreachable: every class is in one of the alternatives
    }

    // The bytes between two positions in GPT-2's spelling.
    std::string spelling(size_t begin, size_t end) const {
        static const std::array<std::string, 256> byte_spelling = spell_bytes();
        std::string                               result;
        result.reserve(2 * (starts[end] - starts[begin]));
        for (size_t i = starts[begin]; i < starts[end]; i++) {
            result += byte_spelling[(uint8_t) utf8[i]];
        }
        return result;
    }

  private:
    std::string          utf8;     // well-formed
    std::vector<uint8_t> classes;  // of each character, kimi_class bits
    std::vector<size_t>  starts;   // of each character in utf8, and utf8.size()

    bool in(size_t pos, unsigned any_of) const { return pos < size() && (classes[pos] & any_of) != 0; }

    bool out_of(size_t pos, unsigned all_of) const { return pos < size() && (classes[pos] & all_of) == 0; }

    size_t skip(size_t pos, unsigned any_of) const {
        while (in(pos, any_of)) {
            pos++;
        }
        return pos;
    }

    // The first byte of character `pos`, lower-cased if ASCII; 0 after the end.
    char ascii(size_t pos) const {
        const char c = pos < size() ? utf8[starts[pos]] : '\0';
        return c >= 'A' && c <= 'Z' ? (char) (c - 'A' + 'a') : c;
    }

    size_t han(size_t pos) const { return skip(pos, KIMI_HAN); }

    // Alternatives 2 and 3. A mark is prefix, UPPER and LOWER at once, letters without case are UPPER and LOWER.
    size_t word(size_t pos) const {
        const bool   prefix = out_of(pos, KIMI_LETTER | KIMI_NUMBER | KIMI_NEWLINE);
        const size_t begin  = prefix ? pos + 1 : pos;

        // Greedy UPPER*; gives characters back until LOWER+ matches one.
        const size_t upper_end = skip(begin, KIMI_UPPER);
        if (in(upper_end, KIMI_LOWER)) {
            return contraction(skip(upper_end, KIMI_LOWER));
        }
        for (size_t i = upper_end; i > begin; i--) {
            if (in(i - 1, KIMI_LOWER)) {
                return contraction(i);
            }
        }
        // The same without the prefix: LOWER+ is the mark in its place.
        if (prefix && in(pos, KIMI_LOWER)) {
            return contraction(begin);
        }
        return upper_end > begin ? contraction(upper_end) : pos;
    }

    // (?i:'s|'t|'re|'ve|'m|'ll|'d)? at the end of a word. The only non-ASCII letter that folds to one of these
    // is U+017F, a long s.
    size_t contraction(size_t pos) const {
        if (ascii(pos) != '\'') {
            return pos;
        }
        const char first  = ascii(pos + 1);
        const char second = ascii(pos + 2);
        if (first == 's' || first == 't' || first == 'm' || first == 'd' || is_long_s(pos + 1)) {
            return pos + 2;
        }
        if (((first == 'r' || first == 'v') && second == 'e') || (first == 'l' && second == 'l')) {
            return pos + 3;
        }
        return pos;
    }

    bool is_long_s(size_t pos) const { return pos < size() && utf8.compare(starts[pos], 2, "\xC5\xBF") == 0; }

    size_t number(size_t pos) const {
        size_t end = pos;
        while (end < pos + 3 && in(end, KIMI_NUMBER)) {
            end++;
        }
        return end;
    }

    size_t symbol(size_t pos) const {
        constexpr unsigned NO_SYMBOL = KIMI_SPACE | KIMI_LETTER | KIMI_NUMBER;

        const size_t begin = ascii(pos) == ' ' ? pos + 1 : pos;
        size_t       end   = begin;
        while (out_of(end, NO_SYMBOL)) {
            end++;
        }
        return end > begin ? skip(end, KIMI_NEWLINE) : pos;
    }

    // Alternatives 6 to 8: up to the last line end of the run; else all of it at the end of the text; else all but
    // one character, which belongs to the next word.
    size_t blank(size_t pos) const {
        const size_t run_end = skip(pos, KIMI_SPACE);
        for (size_t i = run_end; i > pos; i--) {
            if (in(i - 1, KIMI_NEWLINE)) {
                return i;
            }
        }
        return run_end == size() || run_end <= pos + 1 ? run_end : run_end - 1;
    }
};

}  // namespace kimi

std::vector<std::string> kimi_split(const std::string & text) {
    const kimi::character_text characters(text);
    std::vector<std::string>   pieces;
    for (size_t pos = 0; pos < characters.size();) {
        const size_t end = characters.piece_end(pos);
        pieces.push_back(characters.spelling(pos, end));
        pos = end;
    }
    return pieces;
}
