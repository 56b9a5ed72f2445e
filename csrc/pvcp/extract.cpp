#include "extract.h"

#include <algorithm>
#include <cstring>

#include "../cif/characters.h"

namespace catmllm::pvcp {
namespace {

using cif::is_digit;
using cif::is_lower;
using cif::is_space_or_unicode;
using cif::starts_with;

constexpr std::size_t kNowhere = std::string_view::npos;
constexpr int kWordsOfProse = 3;
constexpr std::size_t kLastLine = 400;  // a last line longer than this is looked at from here on

unsigned char byte(char c) { return static_cast<unsigned char>(c); }
bool is_word(unsigned char c) { return cif::is_alpha(c) || is_digit(c) || c == '_'; }

std::size_t skip_space(std::string_view s, std::size_t i) {
    while (i < s.size() && is_space_or_unicode(byte(s[i]))) ++i;
    return i;
}

std::string_view strip_end(std::string_view s) {
    while (!s.empty() && is_space_or_unicode(byte(s.back()))) s.remove_suffix(1);
    return s;
}

// `tag` (lower case, beginning with `<`) in any case, from `from` on.
std::size_t find_tag(std::string_view s, std::string_view tag, std::size_t from) {
    for (std::size_t i = from; (i = s.find('<', i)) != kNowhere; ++i) {
        if (s.size() - i < tag.size()) return kNowhere;
        std::size_t k = 1;
        while (k < tag.size() && cif::to_lower(byte(s[i + k])) == tag[k]) ++k;
        if (k == tag.size()) return i;
    }
    return kNowhere;
}

// Where the last assistant turn begins.
std::size_t last_turn(std::string_view s) {
    std::size_t start = 0;
    for (std::size_t i = 0; (i = s.find("<|", i)) != kNowhere; ++i) {
        const std::string_view rest = s.substr(i);
        const std::string_view chatml = "<|im_start|>", header = "<|start_header_id|>",
                               header_end = "<|end_header_id|>";
        const bool is_header = starts_with(rest, header);
        if (!is_header && !starts_with(rest, chatml)) continue;
        std::size_t end = skip_space(s, i + (is_header ? header.size() : chatml.size()));
        if (!starts_with(s.substr(end), "assistant")) continue;
        end += 9;
        if (is_header) {
            end = skip_space(s, end);
            if (starts_with(s.substr(end), header_end)) start = end + header_end.size();
        } else if (end == s.size() || !is_word(byte(s[end]))) {
            start = end;
        }
    }
    return start;
}

// Where the turn ends.
std::size_t end_of_turn(std::string_view s) {
    std::size_t end = s.size();
    for (std::size_t i = 0; (i = s.find("<|", i)) != kNowhere; ++i) {
        const std::string_view rest = s.substr(i);
        if (starts_with(rest, "<|im_end|>") || starts_with(rest, "<|endoftext|>") ||
            starts_with(rest, "<|eot_id|>") || starts_with(rest, "<|end_of_text|>")) {
            end = i;
            break;
        }
    }
    const std::string_view text = strip_end(s);
    if (text.size() >= 4 && text.substr(text.size() - 4) == "</s>") end = std::min(end, text.size() - 4);
    return end;
}

// `data_` behind nothing but white space at the beginning of the line at `line`.
bool begins_block(std::string_view s, std::size_t line) {
    while (line < s.size() && s[line] != '\n' && is_space_or_unicode(byte(s[line]))) ++line;
    return starts_with(s.substr(line), "data_");
}

std::size_t next_line(std::string_view s, std::size_t from) {
    const std::size_t end = s.find('\n', from);
    return end == kNowhere ? s.size() : end + 1;
}

// The first line of s that begins a block.
std::size_t find_block(std::string_view s) {
    for (std::size_t line = 0; line < s.size(); line = next_line(s, line))
        if (begins_block(s, line)) return line;
    return kNowhere;
}

// A `data_` inside a line, behind white space or a colon.
std::size_t find_inline_block(std::string_view s) {
    for (std::size_t i = 0; (i = s.find("data_", i)) != kNowhere; ++i)
        if (i > 0 && (s[i - 1] == ':' || is_space_or_unicode(byte(s[i - 1])))) return i;
    return kNowhere;
}

// The last fenced passage that holds a block; everything where no fence does.
Span fenced(std::string_view s) {
    Span found = {0, s.size()};
    char opened = 0;
    std::size_t length = 0;
    std::size_t inside = 0;
    const auto take = [&](std::size_t end) {
        if (inside < end && find_block(s.substr(inside, end - inside)) != kNowhere) found = {inside, end};
    };
    for (std::size_t line = 0; line < s.size(); line = next_line(s, line)) {
        std::size_t mark = line;
        while (mark < s.size() && mark - line < 3 && (s[mark] == ' ' || s[mark] == '\t')) ++mark;
        if (mark == s.size() || (s[mark] != '`' && s[mark] != '~')) continue;
        std::size_t end = mark;
        while (end < s.size() && s[end] == s[mark]) ++end;
        if (end - mark < 3) continue;
        if (opened == 0) {
            opened = s[mark];
            length = end - mark;
            inside = next_line(s, line);
        } else if (opened == s[mark] && end - mark >= length) {
            take(line);
            opened = 0;
        }
    }
    if (opened != 0) take(s.size());
    return found;
}

// A plain word: letters in lower case but for the first, brackets and stops around them, an apostrophe inside.
bool is_plain_word(std::string_view s) {
    if (s.size() < 2) return false;
    const auto one_of = [](char c, const char* set) { return c != 0 && std::strchr(set, c) != nullptr; };
    std::size_t i = 0;
    while (i < s.size() && one_of(s[i], "(*\"'")) ++i;
    const std::size_t letters = i;
    if (i < s.size() && cif::is_alpha(byte(s[i]))) ++i;
    while (i < s.size() && is_lower(byte(s[i]))) ++i;
    if (i == letters || !is_lower(byte(s[i - 1]))) return false;
    if (i + 1 < s.size() && (s[i] == '\'' || byte(s[i]) == cif::kUnicodeOther) && is_lower(byte(s[i + 1])))
        for (++i; i < s.size() && is_lower(byte(s[i]));) ++i;
    while (i < s.size() && one_of(s[i], ".,:;!?)*\"'")) ++i;
    return i == s.size();
}

bool is_prose(std::string_view line) {
    int words = 0;
    for (std::size_t i = skip_space(line, 0); i < line.size(); i = skip_space(line, i)) {
        std::size_t end = i;
        while (end < line.size() && !is_space_or_unicode(byte(line[end]))) ++end;
        words += is_plain_word(line.substr(i, end - i));
        if (words == kWordsOfProse) return true;
        i = end;
    }
    return false;
}

// Where prose behind the last row begins. A text whose last line is a row of numbers has none: that costs nothing.
std::size_t end_of_rows(std::string_view s) {
    std::string_view last = strip_end(s.substr(s.size() - std::min(s.size(), kLastLine)));
    const std::size_t line_break = last.rfind('\n');
    if (line_break != kNowhere) last.remove_prefix(line_break + 1);
    if (std::any_of(last.begin(), last.end(), [](char c) { return is_digit(byte(c)); }) && !is_prose(last))
        return s.size();
    std::size_t tail = 0;
    for (std::size_t line = 0; line < s.size(); line = next_line(s, line)) {
        std::size_t key = line;
        while (key < s.size() && s[key] != '\n' && is_space_or_unicode(byte(s[key]))) ++key;
        const std::string_view rest = s.substr(key);
        if (starts_with(rest, "_") || starts_with(rest, "loop_") || starts_with(rest, "data_") ||
            starts_with(rest, ";"))
            tail = line;
    }
    for (std::size_t line = next_line(s, tail); line < s.size(); line = next_line(s, line)) {
        const std::size_t end = std::min(s.find('\n', line), s.size());
        if (s[line] != '\'' && s[line] != '"' && is_prose(s.substr(line, end - line))) return line;
    }
    return s.size();
}

// The answer's last turn without its `<think>` passages, as parts.
void without_markup(std::string_view answer, std::vector<Span>& parts) {
    std::size_t start = last_turn(answer);
    if (find_tag(answer, "<think>", start) == kNowhere) {  // the template opened it in the prompt
        for (std::size_t i = start; (i = find_tag(answer, "</think>", i)) != kNowhere;) start = i += 8;
    }
    while (start < answer.size()) {
        const std::size_t opened = find_tag(answer, "<think>", start);
        if (opened == kNowhere) break;
        if (opened > start) parts.emplace_back(start, opened);
        const std::size_t closed = find_tag(answer, "</think>", opened + 7);
        start = closed == kNowhere ? answer.size() : closed + 8;
    }
    if (start < answer.size() || parts.empty()) parts.emplace_back(start, answer.size());
}

// Cuts the parts down to [span) of what they are together.
void cut(std::vector<Span>& parts, Span span) {
    std::size_t before = 0;
    std::size_t kept = 0;
    for (const Span part : parts) {
        const std::size_t length = part.second - part.first;
        const std::size_t from = std::min(std::max(span.first, before) - before, length);
        const std::size_t to = std::min(std::max(span.second, before) - before, length);
        if (from < to) parts[kept++] = {part.first + from, part.first + to};
        before += length;
    }
    parts.resize(kept);
}

}  // namespace

std::string_view extract_cif(std::string_view answer, std::string& joined, std::vector<Span>& parts) {
    parts.clear();
    const bool markup = answer.find('<') != kNowhere;
    if (markup) {
        without_markup(answer, parts);
    } else {
        parts.emplace_back(0, answer.size());
    }
    std::string_view text = answer.substr(parts[0].first, parts[0].second - parts[0].first);
    if (parts.size() > 1) {
        joined.clear();
        for (const Span part : parts) joined.append(answer.substr(part.first, part.second - part.first));
        text = joined;
    }
    Span span = {0, markup ? end_of_turn(text) : text.size()};
    const auto narrow = [&](Span inner) { span = {span.first + inner.first, span.first + inner.second}; };
    const auto current = [&] { return text.substr(span.first, span.second - span.first); };
    if (current().find("```") != kNowhere || current().find("~~~") != kNowhere) narrow(fenced(current()));
    std::size_t block = find_block(current());
    if (block == kNowhere) block = find_inline_block(current());
    if (block != kNowhere) {
        span.first += block;
        narrow({0, end_of_rows(current())});
    }
    cut(parts, span);
    return current();
}

}  // namespace catmllm::pvcp
