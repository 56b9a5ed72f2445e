#include "cif_end.h"

#include <algorithm>
#include <cstring>

#include "../cif/characters.h"
#include "../cif/elements.h"
#include "../cif/number.h"

namespace catmllm::pvcp {
namespace {

using cif::is_digit;
using cif::is_lower;
using cif::is_space_or_unicode;
using cif::is_upper;
using cif::starts_with;

// Neither white space nor beyond ASCII.
bool is_plain(char c) { return byte(c) - 0x21u < 0x5fu; }

// The words of a line, quotes as in CIF; a `#` at the begin of a word ends it.
class Words {
  public:
    explicit Words(std::string_view line) : line_(line) {}
    bool next(Word& word) {
        for (;; ++at_) {  // past a quote that does not close, as pymatgen does
            while (at_ < line_.size() && is_space_or_unicode(byte(line_[at_]))) ++at_;
            if (at_ == line_.size() || line_[at_] == '#') return false;
            const char c = line_[at_];
            if (c != '\'' && c != '"') break;
            const std::size_t close = at_ < no_close_[c == '"'] ? kNowhere : closing(c);
            if (close == kNowhere) {
                no_close_[c == '"'] = line_.size();
                continue;
            }
            word = {line_.substr(at_ + 1, close - at_ - 1), true};
            at_ = close + 1;
            return true;
        }
        const std::size_t start = at_;
        while (at_ < line_.size() && (is_plain(line_[at_]) || !is_space_or_unicode(byte(line_[at_])))) ++at_;
        word = {line_.substr(start, at_ - start), false};
        return true;
    }

  private:
    std::size_t closing(char quote) const {
        std::size_t end = line_.find(quote, at_ + 1);
        while (end != kNowhere && end + 1 < line_.size() && !is_space_or_unicode(byte(line_[end + 1])))
            end = line_.find(quote, end + 1);
        return end;
    }
    std::string_view line_;
    std::size_t at_ = 0;
    std::size_t no_close_[2] = {0, 0};  // no quote of this kind closes before here
};

bool is_number(std::string_view s) {
    double value;
    return s == "?" || s == "." || cif::str2float(s, value);
}

// `Pt`, `Pt1`, `O2-`: the letters of the element, 0 for what is none.
std::size_t element_letters(std::string_view s) {
    if (s.empty() || !is_upper(byte(s[0]))) return 0;
    const std::size_t letters = s.size() > 1 && is_lower(byte(s[1])) ? 2 : 1;
    if (cif::find_element(s[0], letters == 2 ? s[1] : 0) == cif::kNoElement) return 0;
    for (std::size_t i = letters; i < s.size(); ++i)
        if (!is_digit(byte(s[i])) && s[i] != '+' && s[i] != '-') return 0;
    return letters;
}

bool has_digit(std::string_view s) {
    return std::any_of(s.begin(), s.end(), [](char c) { return is_digit(byte(c)); });
}

bool has_letter(std::string_view s) {
    return std::any_of(s.begin(), s.end(), [](char c) { return cif::is_alpha(byte(c)); });
}

// Letters of "x, y, z" alone.
bool is_operation(std::string_view s) {
    const auto speaks = [](char c) {
        return is_digit(byte(c)) || std::string_view("xyzXYZ").find(c) != kNowhere;
    };
    return std::any_of(s.begin(), s.end(), speaks) && std::all_of(s.begin(), s.end(), [](char c) {
               return is_digit(byte(c)) || std::string_view("xyzXYZ+-*/., ").find(c) != kNowhere;
           });
}

// A name of the CIF dictionaries, `_cell_length_a`: lower case first, several parts. Emphasis (`_Note_`) is
// none.
bool is_data_name(std::string_view s) {
    if (s.size() < 4 || !is_lower(byte(s[1]))) return false;
    const std::size_t second = s.find_first_of("_.", 1);
    return second != kNowhere && second + 1 < s.size() && std::all_of(s.begin(), s.end(), [](char c) {
               return cif::is_alpha(byte(c)) || is_digit(byte(c)) ||
                      std::string_view("_.-/%[]").find(c) != kNowhere;
           });
}

Kind kind_of(std::string_view name) {
    if (name == "_atom_site_type_symbol") return Kind::kSymbol;
    if (name == "_atom_site_label") return Kind::kLabel;
    if (starts_with(name, "_atom_site_fract_")) return Kind::kCoordinate;
    if (name.find("xyz") == kNowhere) return Kind::kAny;
    const bool operation = name.find("_as_xyz") != kNowhere || name.find("operation_xyz") != kNowhere ||
                           name.find("operation.xyz") != kNowhere;
    return operation ? Kind::kOperation : Kind::kAny;
}

// The state between lines: what the next value would be.
class Lines {
  public:
    explicit Lines(LineScratch& scratch) : kinds_(scratch.kinds), words_(scratch.words) { forget(); }

    // Can this line, which begins neither with a key nor with `loop_`, follow?
    bool may_follow(std::string_view line) {
        if (value_wanted_) return true;
        count();
        if (!loop_ || kinds_.empty()) return false;
        read(line);
        if (first_row_) return true;
        if (filled_ == 0) return (words_.size() >= kinds_.size() ? is_row() : fits(0)) || begins_row();
        if (fits(filled_)) return true;
        if (!fits(0) && !begins_row()) return false;
        filled_ = 0;  // the row before is damaged; rows go on
        return true;
    }

    // A whole row of sites, wherever the row before it ended. Behind a line that may not follow it shows that
    // the loop goes on.
    bool is_whole_row(std::string_view line) {
        if (!sites_) return false;
        read(line);
        if (words_.size() < kinds_.size() || !is_row()) return false;
        filled_ = 0;
        return true;
    }

    // The line that was looked at may be a row that is garbled: it has as many words as the loop of sites,
    // and as many numbers as that has coordinates.
    bool may_be_row() const {
        if (!sites_ || words_.size() < kinds_.size()) return false;
        return std::count_if(words_.begin(), words_.end(), [](const Word& w) { return is_number(w.text); }) >=
               std::count(kinds_.begin(), kinds_.end(), Kind::kCoordinate);
    }

    // A row of sites that needs no closer look: `Pt  Pt3  ...`, or `Pt3  Pt  ...`. What follows of it is
    // counted only if the next line is no such row: it may have been cut, or go on there.
    bool passes_as_row(std::string_view line) {
        if (!sites_ || first_row_ || value_wanted_) return false;
        if (filled_ != 0 && counted_.empty()) return false;
        std::size_t i = 0;
        while (i < line.size() && line[i] == ' ') ++i;
        std::size_t letters = 0;
        while (letters < 3 && i + letters < line.size() && cif::is_alpha(byte(line[i + letters]))) ++letters;
        if (letters == 0 || letters > 2 || !is_upper(byte(line[i]))) return false;
        std::size_t second = i + letters;
        while (second < line.size() && is_digit(byte(line[second]))) ++second;
        const std::size_t gap = second;
        while (second < line.size() && line[second] == ' ') ++second;
        if (second == gap || second + letters > line.size() || line[second] != line[i]) return false;
        if (letters == 2 && line[second + 1] != line[i + 1]) return false;
        second += letters;
        if (second < line.size() && !is_digit(byte(line[second])) && line[second] != ' ') return false;
        counted_ = line;
        return true;
    }

    // How much of such a line: words behind a whole row of sites that are neither numbers nor begin a row do
    // not.
    std::size_t length_of_row(std::string_view line) const {
        if (value_wanted_ || !loop_ || filled_ != 0 || words_.size() <= kinds_.size() || !sites_)
            return line.size();
        const Word& extra = words_[kinds_.size()];
        if (!is_row() || is_number(extra.text) || element_letters(extra.text) != 0) return line.size();
        return static_cast<std::size_t>(extra.text.data() - line.data());
    }

    void take(std::string_view line) {
        count();
        Words words(line);
        for (Word word; words.next(word);) {
            if (value_wanted_) {
                value_wanted_ = false;
            } else if (!word.quoted && starts_with(word.text, "loop_")) {
                loop_ = naming_ = first_row_ = true;
                sites_ = false;
                kinds_.clear();
                filled_ = 0;
            } else if (!word.quoted && word.text[0] == '_') {
                if (naming_) {
                    kinds_.push_back(kind_of(word.text));
                    sites_ |= kinds_.back() == Kind::kCoordinate;
                } else {
                    loop_ = sites_ = false;
                    value_wanted_ = true;
                }
            } else {
                value(word.text);
            }
        }
    }

    void value(std::string_view text) {
        count();
        value_wanted_ = naming_ = false;
        if (!loop_ || kinds_.empty()) return;
        Kind& kind = kinds_[filled_];
        if (first_row_ && kind == Kind::kAny) {
            if (text != "?" && text != "." && is_number(text)) kind = Kind::kNumber;
            if (!text.empty() && cif::is_alpha(byte(text[0]))) kind = Kind::kName;
        }
        if (++filled_ < kinds_.size()) return;
        filled_ = 0;
        first_row_ = false;
    }

    void forget() {
        value_wanted_ = loop_ = naming_ = sites_ = first_row_ = false;
        counted_ = {};
        filled_ = 0;
        kinds_.clear();
    }

  private:
    // The values of a line, up to a key or `loop_`.
    void read(std::string_view line) {
        words_.clear();
        Words words(line);
        for (Word word; words.next(word);) {
            if (!word.quoted && (word.text[0] == '_' || starts_with(word.text, "loop_"))) break;
            words_.push_back(word);
        }
    }
    // The values of the last row that only passed.
    void count() {
        if (counted_.empty()) return;
        Words words(counted_);
        std::size_t n = 0;
        for (Word word; words.next(word);) ++n;
        filled_ = n < kinds_.size() ? n : 0;
        counted_ = {};
    }
    // However little of the rest is right: the symbol of an element, then a label that begins with it.
    bool begins_row() const {
        for (std::size_t i = 0; i + 1 < std::min(kinds_.size(), words_.size()); ++i) {
            const bool first = kinds_[i] == Kind::kSymbol && kinds_[i + 1] == Kind::kLabel;
            if (!first && !(kinds_[i] == Kind::kLabel && kinds_[i + 1] == Kind::kSymbol)) continue;
            const std::string_view symbol = words_[first ? i : i + 1].text;
            const std::size_t letters = element_letters(symbol);
            return letters != 0 && starts_with(words_[first ? i + 1 : i].text, symbol.substr(0, letters));
        }
        // labels alone: `Pt3`, and a number somewhere
        if (!sites_ || words_.empty() || kinds_[0] != Kind::kLabel) return false;
        const auto number = [](const Word& word) { return is_number(word.text); };
        return element_letters(words_[0].text) != 0 && has_digit(words_[0].text) &&
               std::any_of(words_.begin() + 1, words_.end(), number);
    }
    // A row of at least as many words as columns: of others than sites all must fit. Of sites a letter must
    // stand where the atom is named, and a number at each coordinate: `?` is one only beside a capital
    // letter.
    bool is_row() const {
        if (!sites_) return fits(0);
        bool named = false;
        bool capital = false;
        bool known = true;
        for (std::size_t i = 0; i < kinds_.size(); ++i) {
            const std::string_view text = words_[i].text;
            if (kinds_[i] == Kind::kCoordinate) {
                if (!is_number(text)) return false;
                known &= text != "?" && text != ".";
            } else if (kinds_[i] == Kind::kSymbol || kinds_[i] == Kind::kLabel) {
                named |= has_letter(text);
                capital |= !text.empty() && is_upper(byte(text[0]));
            }
        }
        return named && (known || capital);
    }
    bool labels_are_symbols() const {
        return std::find(kinds_.begin(), kinds_.end(), Kind::kSymbol) == kinds_.end();
    }
    // The words from column `at` on are of their columns' kinds; words that nothing speaks for hold a digit.
    // (A column's first value tells whether it holds numbers, or names that begin with a letter.)
    bool fits(std::size_t at) const {
        bool evidence = false;
        bool comma = false;  // of an operation, in this word or the one before: `x, y, z` may be three
        std::string_view symbol;
        for (const Word& word : words_) {
            switch (kinds_[at]) {
                case Kind::kNumber:
                case Kind::kCoordinate:
                    if (!is_number(word.text)) return false;
                    evidence = true;
                    break;
                case Kind::kSymbol:
                    if (element_letters(word.text) == 0) return false;
                    symbol = word.text.substr(0, element_letters(word.text));
                    evidence = true;
                    break;
                case Kind::kLabel:
                    if (symbol.empty() ? element_letters(word.text) == 0 && !has_digit(word.text)
                                       : !starts_with(word.text, symbol) && !has_digit(word.text))
                        return false;
                    if (at == 0 && &word == words_.data() && !has_letter(word.text)) {
                        if (labels_are_symbols()) return false;  // `1` names no element
                        break;                                   // and speaks for no row
                    }
                    evidence = true;
                    break;
                case Kind::kOperation:
                    if (!is_operation(word.text) || !(comma || word.text.find(',') != kNowhere)) return false;
                    comma = word.text.find(',') != kNowhere;
                    evidence = true;
                    break;
                case Kind::kName:
                    if (!word.quoted && !cif::is_alpha(byte(word.text[0])) && word.text != "?" &&
                        word.text != ".")
                        return false;
                    evidence |= word.quoted || has_digit(word.text);
                    break;
                case Kind::kAny:
                    evidence |= word.quoted || has_digit(word.text);
            }
            if (++at == kinds_.size()) at = 0;
        }
        return evidence;
    }

    bool value_wanted_;  // a key was the last word
    bool loop_;
    bool naming_;               // its columns are being named
    bool sites_;                // it has coordinates
    std::string_view counted_;  // a row that passed, its values not yet counted
    bool first_row_;            // not yet read to the end: it shows which columns hold numbers
    std::size_t filled_;        // of the row in progress
    std::vector<Kind>& kinds_;
    std::vector<Word>& words_;
};

std::size_t end_of_line(std::string_view s, std::size_t from) {
    return std::min(s.find('\n', from), s.size());
}

// The last `p` before `end`; kNowhere where there is none.
std::size_t last_p(std::string_view s, std::size_t end) {
    constexpr std::uint64_t kLow = 0x7F7F7F7F7F7F7F7Full;
    for (; end >= 8; end -= 8) {
        const std::uint64_t word = cif::word_at(s.data() + end - 8) ^ 0x7070707070707070ull;
        const std::uint64_t zeros = ~(((word & kLow) + kLow) | word | kLow);  // 0x80 where a byte is `p`
        if (zeros != 0) return end - 1 - static_cast<std::size_t>(__builtin_clzll(zeros)) / 8;
    }
    while (end > 0 && s[end - 1] != 'p') --end;
    return end - 1;
}

// The words of this line surely end a value that was wanted, and want none: `_key 1`, `data_x`, a row.
bool leaves_nothing_open(std::string_view line) {
    std::size_t i = 0;
    const auto skip_word = [&] {
        while (i < line.size() && is_plain(line[i])) ++i;
    };
    const auto skip_blanks = [&] {
        while (i < line.size() && line[i] == ' ') ++i;
    };
    skip_blanks();
    if (i < line.size() && line[i] == '_') {
        skip_word();
        skip_blanks();
    }
    if (i == line.size() || !(cif::is_alpha(byte(line[i])) || is_digit(byte(line[i])))) return false;
    skip_word();
    return line.find('_', i) == kNowhere;
}

// Where the last loop begins if all before it is of no account, else 0: `loop_` at the begin of a line
// forgives strays and wipes out what was read, unless it stands in a text field, in a further block or where
// a key wants its value.
std::size_t last_loop(std::string_view s) {
    // the nearer `data_` first: a text may have many blocks
    if (s.find("data_", 1) != kNowhere || std::memchr(s.data(), ';', s.size()) != nullptr) return 0;
    for (std::size_t at = s.size(); (at = last_p(s, at)) != kNowhere;) {  // a rare letter
        if (at < 4 || !starts_with(s.substr(at - 3), "loop_")) continue;
        std::size_t line = at - 3;
        while (line > 0 && s[line - 1] == ' ') --line;
        if (line < 2 || s[line - 1] != '\n') continue;
        const std::size_t before = s.rfind('\n', line - 2) + 1;
        return leaves_nothing_open(s.substr(before, line - 1 - before)) ? line : 0;
    }
    return 0;
}

}  // namespace

std::size_t length_of_cif(std::string_view s, LineScratch& scratch, std::size_t other) {
    Lines reader(scratch);
    std::size_t stray = kNowhere;  // the first line that does not belong
    bool directly = false;         // no empty line since the last that belongs
    bool garbled = false;          // all that does not belong may be rows
    for (std::size_t line = last_loop(s); line < s.size();) {
        const std::size_t end = end_of_line(s, line);
        const std::string_view text = s.substr(line, end - line);
        std::size_t next = end + 1;
        if (stray == kNowhere && reader.passes_as_row(text)) {
            directly = true;
            line = next;
            continue;
        }
        if (stray != kNowhere && line > other) return stray;
        std::size_t first = 0;
        while (first < text.size() &&
               (is_space_or_unicode(byte(text[first])) || (stray != kNowhere && text[first] == '>')))
            ++first;
        const std::string_view word = text.substr(first);
        if (line == 0 || starts_with(word, "data_")) {
            if (stray != kNowhere) return stray;
            reader.forget();
            const std::size_t header = std::min(word.find_first_of(" \t\r"), word.size());
            reader.take(word.substr(header));
        } else if (text.empty() || word.empty()) {
            directly = false;
        } else if (word[0] == '#') {
        } else if (text[0] == ';') {
            std::size_t close = s.find("\n;", line);
            if (close == kNowhere) return std::min(stray, line);  // all behind it is lost to every reader
            if (stray == kNowhere) reader.value("");
            next = close + 2;
            const std::size_t rest = end_of_line(s, next);
            if (stray == kNowhere) reader.take(s.substr(next, rest - next));
            next = rest + 1;
        } else if (word[0] == '_' || starts_with(word, "loop_")) {
            if (stray != kNowhere && word[0] == '_') {
                const std::size_t name = std::min(word.find_first_of(" \t\r"), word.size());
                if (is_data_name(word.substr(0, name))) stray = kNowhere;
            } else {
                stray = kNowhere;
            }
            if (stray == kNowhere) reader.take(text);
        } else if (stray == kNowhere || ((directly || garbled) && reader.is_whole_row(text))) {
            if (stray == kNowhere && !reader.may_follow(text)) {
                stray = line;
                garbled = reader.may_be_row();
            } else if (const std::size_t row = reader.length_of_row(text); row < text.size()) {
                stray = line + row;
                directly = true;
            } else {
                reader.take(text);
                stray = kNowhere;
                directly = true;
            }
        } else {
            garbled = garbled && reader.may_be_row();
        }
        line = next;
    }
    return std::min(stray, s.size());
}

bool is_site_row(std::string_view line) {
    Words words(line);
    Word word;
    if (!words.next(word) || element_letters(word.text) == 0) return false;
    int numbers = 0;
    bool last = false;
    while (words.next(word)) {
        const char c = word.text.empty() ? 'x' : word.text[0];
        last = is_digit(byte(c)) || (c == '-' && word.text.size() > 1 && is_digit(byte(word.text[1])));
        last = last && is_digit(byte(word.text.back()));
        numbers += last;
    }
    return last && numbers >= 3;
}

}  // namespace catmllm::pvcp
