#include "extract.h"

#include <algorithm>
#include <cstring>

#include "../cif/characters.h"

namespace catmllm::pvcp {
namespace {

using cif::is_alpha;
using cif::is_digit;
using cif::is_space_or_unicode;
using cif::starts_with;

constexpr std::size_t kLongestTag = 64;
constexpr std::size_t kHeader = 1000;   // so far from a `data_` inside a line its first key must be
constexpr std::size_t kLastLine = 400;  // a last line longer than this is looked at from here on

bool is_space_at(std::string_view s, std::size_t i) {
    return i < s.size() && is_space_or_unicode(byte(s[i]));
}

std::size_t skip_space(std::string_view s, std::size_t i) {
    while (is_space_at(s, i)) ++i;
    return i;
}

std::size_t skip_blanks(std::string_view s, std::size_t i) {
    while (is_space_at(s, i) && s[i] != '\n') ++i;
    return i;
}

// Where the line of `at` begins; not looked for further than kHeader back.
std::size_t line_start(std::string_view s, std::size_t at) {
    const std::size_t least = at - std::min(at, kHeader);
    while (at > least && s[at - 1] != '\n') --at;
    return at;
}

// Where the white space and `>` right before `at`, on its line, begin.
std::size_t margin(std::string_view s, std::size_t at) {
    while (at > 0 && s[at - 1] != '\n' && (s[at - 1] == '>' || is_space_or_unicode(byte(s[at - 1])))) --at;
    return at;
}

bool begins_line(std::string_view s, std::size_t at) {
    while (at > 0 && s[at - 1] != '\n' && is_space_or_unicode(byte(s[at - 1]))) --at;
    return at == 0 || s[at - 1] == '\n';
}

std::size_t next_line(std::string_view s, std::size_t from) {
    const std::size_t end = s.find('\n', from);
    return end == kNowhere ? s.size() : end + 1;
}

template <std::size_t n>
bool is_one_of(std::string_view word, const std::string_view (&list)[n]) {
    return std::find(list, list + n, word) != list + n;
}

// ---------------------------------------------------------------------------------------------------- tags

constexpr std::string_view kReasoning[] = {"think",     "thinking",         "thought",   "thoughts",
                                           "reasoning", "reason",           "rationale", "reflection",
                                           "analysis",  "begin_of_thought", "scratchpad"};
// Of HTML, inside a line of text; CIF files write `H<sub>2</sub>O`.
constexpr std::string_view kFormatting[] = {"sub", "sup", "i", "b", "em", "strong", "u", "br", "small", "tt"};
constexpr std::string_view kTokens[] = {"eos", "bos", "pad", "unk", "s",    "eot",         "eod",
                                        "eom", "end", "sep", "cls", "mask", "end_of_turn", "endofturn"};
constexpr std::string_view kEndsOfTurn[] = {"im_end",    "endoftext", "eot_id", "end_of_text",
                                            "end",       "return",    "eom_id", "end_of_turn",
                                            "endofturn", "eos",       "eot",    "call"};
// Harmony: reasoning is a message of the channel `analysis`, up to one of these.
constexpr std::string_view kEndsOfMessage[] = {"<|end|>", "<|return|>", "<|call|>"};
constexpr std::string_view kAnalysis = "analysis";
constexpr std::string_view kRoles[] = {"<|im_start|>assistant",
                                       "<|im_start|> assistant",
                                       "<|start_header_id|>assistant<|end_header_id|>",
                                       "<|start|>assistant",
                                       "<|assistant|>",
                                       "<start_of_turn>model",
                                       "<|channel|>final",
                                       "[/INST]",
                                       "<|im_start|>\nassistant",
                                       "<|start_header_id|> assistant <|end_header_id|>"};

// `<name ...>`, `</name>`, `<|name|>`, `[NAME]` and `[/NAME]`.
struct Tag {
    std::size_t begin = 0;
    std::size_t end = 0;  // behind it
    char name[kLongestTag];
    std::size_t size = 0;
    bool closes = false;   // with a slash, or a name that says so
    bool special = false;  // a token of the tokeniser: `<|...|>`, `<eos>`, `[PAD]`
    bool square = false;
    std::string_view word() const { return {name, size}; }
    bool reasoning() const { return is_one_of(word(), kReasoning); }
    bool formatting() const { return !square && is_one_of(word(), kFormatting); }
    bool ends_turn() const { return special && is_one_of(word(), kEndsOfTurn); }
    bool begins_channel() const { return special && word() == "channel"; }
};

bool tag_at(std::string_view s, std::size_t at, Tag& tag) {
    const char open = s[at];
    const bool square = open == '[';
    std::size_t i = at + 1;
    tag = Tag();
    tag.begin = at;
    tag.square = square;
    const bool bar = !square && i < s.size() && (s[i] == '|' || byte(s[i]) == cif::kUnicodeOther);
    i += bar;
    if (!bar && i < s.size() && s[i] == '/') tag.closes = true, ++i;
    while (i < s.size() && tag.size < kLongestTag) {
        const unsigned char c = byte(s[i]);
        const bool inside = is_alpha(c) || c == '_' || c == '-' ||
                            (tag.size > 0 && (is_digit(c) || c == ':')) || (bar && c == cif::kUnicodeOther);
        if (!inside || (square && c >= 'a' && c <= 'z')) break;
        if (bar && c == cif::kUnicodeOther && i + 1 < s.size() && s[i + 1] == '>') break;
        tag.name[tag.size++] = cif::to_lower(c);
        ++i;
    }
    if (tag.size == 0) return false;
    if (bar) {
        if (i + 1 >= s.size() || (s[i] != '|' && byte(s[i]) != cif::kUnicodeOther) || s[i + 1] != '>')
            return false;
        i += 2;
    } else {
        if (!square && i < s.size() && s[i] == ' ') {  // attributes
            const std::size_t close = s.substr(i, kLongestTag).find_first_of("<>\n");
            if (close == kNowhere || s[i + close] != '>') return false;
            i += close;
        }
        if (i < s.size() && s[i] == '/') ++i;
        if (i >= s.size() || s[i] != (square ? ']' : '>')) return false;
        ++i;
    }
    tag.end = i;
    constexpr std::string_view kEnd = "end_of_thought";
    constexpr std::string_view kBegin = "begin_of_thought";
    if (bar && tag.word() == kEnd) {
        tag.closes = true;
        std::memcpy(tag.name, kBegin.data(), tag.size = kBegin.size());
    }
    tag.special = bar || is_one_of(tag.word(), kTokens);
    return true;
}

// A code fence at s[at]: three or more of the same mark; `end` behind its line where that holds nothing but a
// name of a language, else behind the marks.
bool fence_at(std::string_view s, std::size_t at, Tag& fence) {
    std::size_t end = at;
    while (end < s.size() && s[end] == s[at]) ++end;
    if (end - at < 3) return false;
    fence = Tag();
    fence.begin = at;
    fence.end = end;
    const std::string_view rest = s.substr(end, kLongestTag);
    const std::size_t line = next_line(rest, 0);
    if (rest.substr(0, line).find("data_") == kNowhere && (line < kLongestTag || end + line == s.size()))
        fence.end = end + line;
    return true;
}

// ------------------------------------------------------------------------------------ borders of a CIF

// The first `data_` from `from` on that begins a line, behind white space and `>` alone.
std::size_t find_line_block(std::string_view s, std::size_t from) {
    for (std::size_t at = from; (at = s.find("data_", at)) != kNowhere; at += 5) {
        const std::size_t before = margin(s, at);
        if (before == 0 || s[before - 1] == '\n') return at;
    }
    return kNowhere;
}

// The same, or one that stands right at `from`.
std::size_t find_block(std::string_view s, std::size_t from) {
    const std::size_t first = skip_space(s, from);
    return starts_with(s.substr(first), "data_") ? first : find_line_block(s, from);
}

// A `data_` in the middle of a line, with a key or a `loop_` in it or in the next line that is no comment.
std::size_t find_inline_block(std::string_view s, std::size_t from) {
    for (std::size_t at = from; (at = s.find("data_", at)) != kNowhere; at += 5) {
        if (begins_line(s, at)) continue;
        if (at > 0 && (is_alpha(byte(s[at - 1])) || is_digit(byte(s[at - 1])) || s[at - 1] == '_')) continue;
        std::string_view near = s.substr(at, kHeader);
        std::size_t second = next_line(near, 0);
        while (second < near.size()) {
            const std::size_t word = skip_blanks(near, second);
            if (word < near.size() && near[word] != '#' && near[word] != '\n') break;
            second = next_line(near, second);
        }
        near = near.substr(0, next_line(near, second));
        for (std::size_t i = 5; i + 1 < near.size(); ++i)
            if (is_space_or_unicode(byte(near[i])) &&
                (near[i + 1] == '_' || starts_with(near.substr(i + 1), "loop_")))
                return at;
    }
    return kNowhere;
}

// Walks over the borders in a text: tags, special tokens, code fences.
class Borders {
  public:
    static constexpr char kMarks[4] = {'<', '[', '`', '~'};

    explicit Borders(std::string_view s) : s_(s) {
        for (int k = 0; k < 4; ++k) next_[k] = s.find(kMarks[k]);
    }

    // The next border at or after `from`; false where there is none. `block`: where the segment's CIF begins.
    bool next(std::size_t from, std::size_t block, Tag& border) {
        for (std::size_t at = from; (at = mark(at)) != kNowhere; ++at) {
            if (at > block) {
                const std::size_t past = behind_field(at, block);
                if (past != at) {
                    at = past - 1;
                    continue;
                }
            }
            const bool tick = s_[at] == '`' || s_[at] == '~';
            if (tick ? !fence_at(s_, at, border) : !tag_at(s_, at, border)) {
                if (tick)
                    while (at + 1 < s_.size() && s_[at + 1] == s_[at]) ++at;
                continue;
            }
            if (at > block ? !ends_cif(border, block) : !in_prose(border)) continue;
            return true;
        }
        return false;
    }

  private:
    std::size_t mark(std::size_t from) {
        std::size_t nearest = kNowhere;
        for (int k = 0; k < 4; ++k) {
            if (next_[k] < from) next_[k] = s_.find(kMarks[k], from);
            nearest = std::min(nearest, next_[k]);
        }
        return nearest;
    }

    // The end of the text field of the CIF that `at` is in, else `at`. Its lines may be indented or quoted as
    // the CIF is.
    std::size_t behind_field(std::size_t at, std::size_t block) {
        if (block != block_) {
            block_ = block;
            const std::size_t line = margin(s_, block);
            mark_ = "\n";
            if (line == 0 || s_[line - 1] == '\n')
                mark_ += s_.substr(line, std::min(block - line, kLongestTag));
            mark_ += ';';
        }
        while (field_end_ <= at) {
            field_begin_ = s_.find(mark_, std::max(field_end_, block));
            field_end_ = field_begin_ == kNowhere ? kNowhere : s_.find(mark_, field_begin_ + mark_.size());
            if (field_end_ == kNowhere) {
                field_begin_ = kNowhere;
            } else {
                field_end_ += mark_.size();
            }
        }
        return field_begin_ != kNowhere && field_begin_ >= block && at > field_begin_ ? field_end_ : at;
    }

    bool in_prose(const Tag& tag) const {
        if (s_[tag.begin] == '~') return begins_line(s_, tag.begin);
        if (tag.formatting()) return false;
        if (tag.square) return tag.special || tag.closes || tag.reasoning() || begins_line(s_, tag.begin);
        // `CO</s>Pt3Cu` is a prompt, not an end
        return !(tag.closes && tag.word() == "s" && tag.end < s_.size() && is_alpha(byte(s_[tag.end])));
    }

    // Is this a border, standing in the CIF that begins at `block`? Not where it is (part of) a value.
    bool ends_cif(const Tag& tag, std::size_t block) const {
        const std::size_t line = std::max(line_start(s_, tag.begin), block);
        const std::string_view before = s_.substr(line, tag.begin - line);
        if (skip_blanks(before, 0) == before.size()) return !tag.formatting();
        if (s_[tag.begin] == '~' || (tag.square && !tag.special && !tag.closes) || tag.formatting())
            return false;
        if (tag.closes && tag.word() == "s" && tag.end < s_.size() &&
            !is_space_or_unicode(byte(s_[tag.end])) && s_[tag.end] != '<')
            return false;
        for (std::size_t i = 0; i < before.size(); ++i) {  // in quotes
            if ((before[i] != '\'' && before[i] != '"') ||
                (i > 0 && !is_space_or_unicode(byte(before[i - 1]))))
                continue;
            std::size_t close = before.find(before[i], i + 1);
            while (close != kNowhere && close + 1 < before.size() &&
                   !is_space_or_unicode(byte(before[close + 1])))
                close = before.find(before[i], close + 1);
            if (close == kNowhere) {
                const std::string_view rest = s_.substr(tag.begin, next_line(s_, tag.begin) - tag.begin);
                return rest.find(before[i]) == kNowhere;
            }
            i = close;
        }
        // the value of a key, as it stands
        std::size_t key = 0;
        while (key < before.size() && (before[key] == '>' || is_space_or_unicode(byte(before[key])))) ++key;
        if (key < before.size() && before[key] == '_' && !tag.closes && !tag.special && s_[tag.begin] == '<')
            return false;
        return true;
    }

    std::string_view s_;
    std::size_t next_[4];
    std::size_t block_ = kNowhere;
    std::string mark_;  // of a text field
    std::size_t field_begin_ = 0;
    std::size_t field_end_ = 0;
};
constexpr char Borders::kMarks[4];

// Where the last assistant turn begins.
std::size_t last_turn(std::string_view s) {
    std::size_t start = 0;
    for (const char mark : {'<', '['}) {
        for (std::size_t at = s.find(mark); at != kNowhere; at = s.find(mark, at + 1)) {
            const std::string_view rest = s.substr(at);
            for (const std::string_view role : kRoles)
                if (starts_with(rest, role)) start = std::max(start, at + role.size());
        }
    }
    return start;
}

// Behind the token that ends Harmony's message; kNowhere where it does not end.
std::size_t end_of_message(std::string_view s, std::size_t from) {
    for (std::size_t at = from; (at = s.find("<|", at)) != kNowhere; ++at)
        for (const std::string_view end : kEndsOfMessage)
            if (starts_with(s.substr(at), end)) return at + end.size();
    return kNowhere;
}

// The last turn's pieces outside of reasoning, between borders.
void find_segments(std::string_view s, std::vector<Span>& segments) {
    segments.clear();
    Borders borders(s);
    std::size_t begin = last_turn(s);
    bool said = false;  // something but white space
    const auto close = [&](std::size_t end) {
        if (begin < end) segments.emplace_back(begin, end);
        said |= skip_space(s, begin) < end;
    };
    std::size_t at = begin;
    std::size_t line_block = find_line_block(s, begin);
    std::size_t block = find_block(s, begin);
    if (block == kNowhere) block = find_inline_block(s, begin);
    for (Tag border; borders.next(at, block, border);) {
        close(border.begin);
        at = begin = border.end;
        if (border.reasoning()) {
            if (border.closes) {  // opened in the prompt
                segments.clear();
                said = false;
            } else {  // what ends other reasoning is a part of it
                Tag end;
                do {
                    if (!borders.next(at, kNowhere, end)) return;
                    at = end.end;
                } while (!(end.closes && end.word() == border.word()));
                begin = at;
            }
        } else if (border.begins_channel() && starts_with(s.substr(skip_space(s, at)), kAnalysis)) {
            const std::size_t end = end_of_message(s, at);
            if (end == kNowhere) return;
            at = begin = end;
        } else if (border.ends_turn() && said) {
            return;
        }
        if (block == kNowhere || block < begin) {
            if (line_block < begin) line_block = find_line_block(s, begin);
            const std::size_t first = skip_space(s, begin);
            block = starts_with(s.substr(first), "data_") ? first : line_block;
        }
    }
    close(s.size());
}

// ------------------------------------------------------------------------------------------ the finder

// Appends the character with this code as characters.h has it.
void append_character(std::uint32_t code, std::string& text) {
    const bool space = code == 0x85 || code == 0xa0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200a) ||
                       code == 0x2028 || code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000;
    text.push_back(static_cast<char>(code < 0x80 ? code : space ? cif::kUnicodeSpace : cif::kUnicodeOther));
}

// Parts [from, to) of the characters that `parts` stand for.
void cut(std::vector<Span>& parts, std::size_t from, std::size_t to) {
    std::size_t before = 0;
    std::size_t kept = 0;
    for (Span part : parts) {  // a copy: parts are written
        const std::size_t length = part.first == kCharacter ? 1 : part.second - part.first;
        const std::size_t low = std::min(std::max(from, before) - before, length);
        const std::size_t high = std::min(std::max(to, before) - before, length);
        before += length;
        if (low >= high) continue;
        parts[kept++] = part.first == kCharacter ? part : Span{part.first + low, part.first + high};
    }
    parts.resize(kept);
}

// What the lines of a quotation or of a list begin with.
struct Margin {
    explicit Margin(std::string_view first) : prefix(first), core(first) {
        while (!core.empty() && core.back() == ' ') core.remove_suffix(1);
        quotation = prefix.find('>') != kNowhere;
    }
    // How much of a line it is: of a quotation's also without blanks at its end, of an empty line's nothing;
    // kNowhere where the line begins otherwise.
    std::size_t of(std::string_view line) const {
        if (starts_with(line, prefix)) return prefix.size();
        if (quotation && starts_with(line, core)) return core.size();
        return skip_space(line, 0) == line.size() ? 0 : kNowhere;
    }
    std::string_view prefix, core;
    bool quotation;
};

class Finder {
  public:
    Finder(std::string_view s, const Reads& reads, Extraction& memory) : s_(s), reads_(reads), m_(memory) {}

    // Sets the result; true where it reads.
    bool find() {
        const std::size_t begin = skip_space(s_, 0);
        if (starts_with(s_.substr(begin), "data_")) {
            if (bare(begin)) return true;
            if (alone(begin)) {
                const std::string_view cif = s_.substr(begin);
                const std::string_view text = cif.substr(0, length_of_cif(cif, m_.lines));
                return candidate(text, kNowhere) || keep(text);
            }
        }
        find_segments(s_, m_.segments);
        segmented_ = true;
        for (std::size_t i = m_.segments.size(); i-- > 0;)
            if (segment(s_.substr(0, m_.segments[i].second), m_.segments[i].first, Where::kMargins))
                return true;
        for (std::size_t i = m_.segments.size(); i-- > 0;)
            if (segment(s_.substr(0, m_.segments[i].second), m_.segments[i].first, Where::kInside))
                return true;
        if (!found_ && !m_.segments.empty()) {
            const Span last = m_.segments.back();
            best_ = s_.substr(last.first, last.second - last.first);
        }
        return false;
    }

    std::string_view text() const { return best_; }
    bool prefixed() const { return prefixed_; }  // the result is of m_.text, whose parts are m_.parts
    bool segmented() const { return segmented_; }

  private:
    // The commonest answer: a CIF alone, its last line a row. It has to read, or the finer ways decide.
    bool bare(std::size_t begin) {
        const std::string_view body = s_.substr(next_line(s_, begin));
        if (std::memchr(body.data(), '<', body.size()) != nullptr) return false;
        return ends_in_row(s_) && candidate(s_.substr(begin), 1);
    }

    // Nothing stands before the CIF, and neither a border nor another `data_` behind: all there is to find is
    // its end.
    bool alone(std::size_t begin) const {
        if (begin > 0 && s_[begin - 1] != '\n') return false;
        for (const char mark : Borders::kMarks)
            if (std::memchr(s_.data(), mark, s_.size()) != nullptr) return false;
        return s_.find("data_", begin + 5) == kNowhere;
    }

    static bool ends_in_row(std::string_view s) {
        while (!s.empty() && is_space_or_unicode(byte(s.back()))) s.remove_suffix(1);
        s = s.substr(s.size() - std::min(s.size(), kLastLine));
        const std::size_t line = s.rfind('\n');
        return line != kNowhere && is_site_row(s.substr(line + 1));
    }

    // Tries a text; it is the result if it reads, as at most `blocks` blocks, or if none was before.
    bool candidate(std::string_view text, std::size_t blocks) {
        if (text.data() != tried_.data() || text.size() != tried_.size()) read_ = reads_(text);
        tried_ = text;
        if (read_ > 0 && read_ <= blocks) {
            found_ = true;
            best_ = text;
            return true;
        }
        return false;
    }

    bool keep(std::string_view text) {
        if (!found_ && !prefixed_) {
            found_ = true;
            best_ = text;
        }
        return false;
    }

    // Where a CIF is looked for: at the begin of lines, there without the margin of its lines too, inside
    // lines.
    enum class Where { kLines, kMargins, kInside };

    // A CIF of a segment; with a margin the lines that have it, which may hold several.
    struct Piece {
        std::size_t begin, end, margin;
    };

    // The last CIF of s from `from` on that reads.
    bool segment(std::string_view s, std::size_t from, Where where) {
        std::vector<Piece> pieces;
        std::vector<std::size_t> ends;
        std::size_t inside = 0;  // the next `data_` inside a line
        for (std::size_t at = from; at < s.size();) {
            const bool known = where == Where::kInside && inside > at;
            const std::size_t begin = known                     ? inside
                                      : where == Where::kInside ? find_inline_block(s, at)
                                                                : find_block(s, at);
            if (begin == kNowhere) break;
            if (where == Where::kMargins) {
                const std::size_t line = std::max(margin(s, begin), from);
                const std::size_t end = end_of_margin(s, line, begin, ends);
                if (end != kNowhere) {
                    pieces.push_back({line, at = end, begin - line});
                    continue;
                }
            }
            // The usual case is tried first: this one is the last and ends in a row.
            if (s.find("data_", begin + 5) == kNowhere && ends_in_row(s.substr(begin)) &&
                candidate(s.substr(begin), 1))
                return true;
            if (where == Where::kInside) inside = find_inline_block(s, begin + 5);
            const std::size_t other =
                where == Where::kInside && inside != kNowhere ? inside - begin : kNowhere;
            at = begin + length_of_cif(s.substr(begin), m_.lines, other);
            pieces.push_back({begin, at, 0});
        }
        for (std::size_t i = pieces.size(); i-- > 0;)
            if (try_piece(s, pieces[i])) return true;
        return false;
    }

    bool try_piece(std::string_view s, const Piece& piece) {
        if (piece.margin != 0)
            return without_margin(s, piece) || segment(s.substr(0, piece.end), piece.begin, Where::kLines);
        const std::string_view text = s.substr(piece.begin, piece.end - piece.begin);
        return candidate(text, kNowhere) || last_block(text) || keep(text);
    }

    // Of blocks that are refused together the last that reads alone.
    bool last_block(std::string_view text) {
        if (text.find("data_", 5) == kNowhere) return false;
        std::size_t end = text.size();
        for (std::size_t at = text.rfind("data_"); at != kNowhere && at > 0;
             at = at == 0 ? kNowhere : text.rfind("data_", at - 1)) {
            if (!begins_line(text, at)) continue;
            if (candidate(text.substr(at, end - at), 1)) return true;
            end = line_start(text, at);
        }
        return end < text.size() && candidate(text.substr(0, end), 1);
    }

    // The end of the lines that begin as the CIF's first does, with `>` of a quotation or the indent of a
    // list; kNowhere where that does not matter: an indent does for text fields.
    std::size_t end_of_margin(std::string_view s, std::size_t line, std::size_t begin,
                              std::vector<std::size_t>& ends) {
        const std::size_t size = begin - line;
        if (size == 0 || size >= kLongestTag || (line > 0 && s[line - 1] != '\n')) return kNowhere;
        ends.resize(kLongestTag);
        if (begin < ends[size]) return kNowhere;  // looked at, with a CIF before
        const Margin margin(s.substr(line, size));
        bool matters = margin.quotation;
        std::size_t at = line;
        while (at < s.size()) {
            const std::size_t end = next_line(s, at);
            const std::string_view text = s.substr(at, end - at);
            const std::size_t skip = margin.of(text);
            if (skip == kNowhere) break;
            matters |= skip == size && skip < text.size() && text[skip] == ';';
            at = end;
        }
        ends[size] = at;
        return matters ? at : kNowhere;
    }

    bool without_margin(std::string_view s, const Piece& piece) {
        const Margin margin(s.substr(piece.begin, piece.margin));
        m_.text.clear();
        m_.parts.clear();
        for (std::size_t at = piece.begin; at < piece.end;) {
            const std::size_t end = std::min(next_line(s, at), piece.end);
            const std::size_t first = at + margin.of(s.substr(at, end - at));
            m_.text.append(s.substr(first, end - first));
            if (first < end) m_.parts.emplace_back(first, end);
            at = end;
        }
        tried_ = {};  // of the same memory, and maybe the same length
        prefixed_ = true;
        return prefixed_ = segment(m_.text, 0, Where::kLines);
    }

    std::string_view s_;
    const Reads& reads_;
    Extraction& m_;
    std::string_view best_;
    std::string_view tried_;  // last, and what came of it
    std::size_t read_ = 0;
    bool found_ = false;
    bool prefixed_ = false;
    bool segmented_ = false;
};

// ------------------------------------------------------------------------------------------------ JSON

int hex(char c) {
    if (is_digit(byte(c))) return c - '0';
    const char low = cif::to_lower(byte(c));
    return low >= 'a' && low <= 'f' ? low - 'a' + 10 : -1;
}

// A string of JSON or of Python, from behind its quote: up to the next one, or without any up to `end`.
struct Escaped {
    std::size_t begin, end;
    char quote;
};

// In a line behind `at` two line breaks are written `\n`.
bool is_escaped(std::string_view s, std::size_t at) {
    std::string_view line = s.substr(at, kHeader);
    line = line.substr(0, next_line(line, 0));
    const std::size_t first = line.find("\\n");
    return first != kNowhere && line.find("\\n", first + 2) != kNowhere;
}

// The escaped strings around each `data_` of the segments from `from` on.
std::vector<Escaped> find_escaped(std::string_view s, std::size_t from, const std::vector<Span>& segments) {
    constexpr char kQuotes[] = {'"', '\''};
    std::vector<Escaped> strings;
    std::size_t opened[2] = {kNowhere, kNowhere};  // on this line, by either quote
    std::size_t last[2] = {kNowhere, kNowhere};    // of the strings
    std::size_t line_end = 0;
    std::size_t at = 0;
    std::size_t segment = 0;
    for (std::size_t i = s.find("data_", from); i != kNowhere; i = s.find("data_", i + 5)) {
        while (segment < segments.size() && segments[segment].second <= i) ++segment;
        if (segment == segments.size()) break;
        if (i < segments[segment].first || !is_escaped(s, i)) continue;
        if (i >= line_end) {
            at = s.rfind('\n', i) + 1;  // 0 where there is none
            line_end = std::min(s.find('\n', i), s.size());
            opened[0] = opened[1] = kNowhere;
        }
        for (; at < i; ++at) {
            if (s[at] == '\\') {
                ++at;
            } else if (s[at] == kQuotes[0] || s[at] == kQuotes[1]) {
                std::size_t& open = opened[s[at] == kQuotes[1]];
                open = open == kNowhere ? at : kNowhere;
            }
        }
        const int kind = opened[0] != kNowhere ? 0 : opened[1] != kNowhere ? 1 : 2;
        if (kind < 2 && last[kind] == opened[kind]) continue;
        if (kind < 2) last[kind] = opened[kind];
        const std::size_t begin = kind < 2 ? opened[kind] + 1 : i;
        if (!strings.empty() && strings.back().quote == 0)
            strings.back().end = std::min(strings.back().end, begin);
        strings.push_back({begin, line_end, kind < 2 ? kQuotes[kind] : '\0'});
    }
    return strings;
}

// What a string stands for.
void unescape(std::string_view s, const Escaped& string, std::string& text, std::vector<Span>& parts) {
    text.clear();
    parts.clear();
    const auto put = [&](std::uint32_t code) {
        append_character(code, text);
        parts.emplace_back(kCharacter, code);
    };
    const std::size_t end = string.end;
    for (std::size_t i = string.begin; i < end; ++i) {
        if (string.quote != 0 && s[i] == string.quote) break;
        if (s[i] != '\\' || i + 1 == end) {
            text.push_back(s[i]);
            if (!parts.empty() && parts.back().first != kCharacter && parts.back().second == i) {
                ++parts.back().second;
            } else {
                parts.emplace_back(i, i + 1);
            }
            continue;
        }
        const char c = s[++i];
        if (c == 'n') {
            put('\n');
        } else if (c == 'r') {
            put('\r');
        } else if (c == 't') {
            put('\t');
        } else if (c == 'u' && i + 4 < end) {
            int code = 0;
            for (int k = 1; k <= 4 && code >= 0; ++k)
                code = hex(s[i + k]) < 0 ? -1 : 16 * code + hex(s[i + k]);
            if (code < 0) continue;
            put(static_cast<std::uint32_t>(code));
            i += 4;
        } else {
            put(byte(c));
        }
    }
}

// Parts of `outer` that the characters of `inner`, parts of the text that `outer` makes up, stand for.
std::vector<Span> composed(const std::vector<Span>& outer, const std::vector<Span>& inner) {
    std::vector<Span> parts;
    std::size_t k = 0;
    std::size_t before = 0;  // characters of outer[0, k)
    for (const Span& wanted : inner) {
        for (std::size_t at = wanted.first; at < wanted.second;) {
            const std::size_t length = outer[k].first == kCharacter ? 1 : outer[k].second - outer[k].first;
            if (before + length <= at) {
                before += length;
                ++k;
                continue;
            }
            const std::size_t end = std::min(wanted.second, before + length);
            const std::size_t first = outer[k].first + (at - before);
            parts.push_back(outer[k].first == kCharacter ? outer[k] : Span{first, first + (end - at)});
            at = end;
        }
    }
    return parts;
}

// The last escaped string from `from` on in which a CIF reads: sets `text` and the parts.
void in_strings(std::string_view answer, std::size_t from, const Reads& reads, Extraction& memory,
                std::string_view& text) {
    const std::vector<Escaped> strings = find_escaped(answer, from, memory.segments);
    if (strings.empty()) return;
    if (!memory.inner) memory.inner = std::make_unique<Extraction>();
    Extraction& inner = *memory.inner;
    std::vector<Span>& parts = memory.unescaped_parts;
    for (std::size_t i = strings.size(); i-- > 0;) {
        unescape(answer, strings[i], memory.unescaped, parts);
        Finder finder(memory.unescaped, reads, inner);
        if (!finder.find()) continue;
        text = finder.text();
        const std::string& whole = finder.prefixed() ? inner.text : memory.unescaped;
        const auto begin = static_cast<std::size_t>(text.data() - whole.data());
        if (finder.prefixed()) {
            cut(inner.parts, begin, begin + text.size());
            memory.parts = composed(parts, inner.parts);
        } else {
            cut(parts, begin, begin + text.size());
            memory.parts.swap(parts);
        }
        return;
    }
}

}  // namespace

std::string_view extract_cif(std::string_view answer, const Reads& reads, Extraction& memory) {
    Finder finder(answer, reads, memory);
    const bool found = finder.find();
    std::string_view text = finder.text();
    if (finder.prefixed()) {
        const auto begin = static_cast<std::size_t>(text.data() - memory.text.data());
        cut(memory.parts, begin, begin + text.size());
    } else {
        const std::size_t begin = text.empty() ? 0 : static_cast<std::size_t>(text.data() - answer.data());
        memory.parts.assign(1, Span{begin, begin + text.size()});
    }
    const std::size_t behind = found ? memory.parts.back().second : 0;
    if (std::memchr(answer.data() + behind, '\\', answer.size() - behind) != nullptr) {
        if (!finder.segmented()) find_segments(answer, memory.segments);
        in_strings(answer, behind, reads, memory, text);
    }
    return text;
}

}  // namespace catmllm::pvcp
