#include "turns.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace catmllm::pvcp {
namespace {

constexpr char32_t kWideBar = 0xFF5C;  // of `<｜User｜>`
// Behind `<|`, `<`, `[`, and on a line of their own, or in front of an empty one.
constexpr std::string_view kTurnTokens[] = {
    "im_start|>",    "start_header_id|>", "start|>",     "assistant|>", "model|>",    "user|>",
    "human|>",       "system|>",          "developer|>", "tool|>",      "function|>", "ipython|>",
    "observation|>", "environment|>",     "channel|>",   "python_tag|>"};
constexpr std::string_view kTags[] = {"start_of_turn>", "tool_",        "function_",
                                      "observation>",   "information>", "interpreter>"};
constexpr std::string_view kBrackets[] = {"INST]", "/INST]", "TOOL_RESULTS]", "/TOOL_RESULTS]",
                                          "TOOL_CALLS]"};
constexpr std::string_view kLines[] = {"assistant\n", "user\n", "tool\n", "ipython\n", "system\n"};
constexpr std::string_view kGlued[] = {"assistant", "user", "ipython"};

template <class Unit>
class Text {
  public:
    Text(const void* data, std::size_t size) : p_(static_cast<const Unit*>(data)), size_(size) {}

    bool may_hold_turns() const {
        if (any_at(kLines, 0)) return true;
        for (std::size_t i = 0; (i = find('<', i)) < size_; ++i) {
            if (i + 1 == size_) break;
            const auto next = static_cast<char32_t>(p_[i + 1]);
            if (next == kWideBar || any_at(kTags, i + 1) || (next == '|' && any_at(kTurnTokens, i + 2)))
                return true;
        }
        for (std::size_t i = 0; (i = find('[', i)) < size_; ++i)
            if (any_at(kBrackets, i + 1)) return true;
        for (std::size_t i = 0; (i = find('\n', i)) < size_; ++i) {
            if (i + 1 == size_) break;
            if (p_[i + 1] != '\n') {
                if (any_at(kLines, i + 1)) return true;
                continue;
            }
            for (const std::string_view role : kGlued)
                if (role.size() <= i && at(role, i - role.size())) return true;
        }
        return false;
    }

  private:
    std::size_t find(char c, std::size_t from) const {
        if constexpr (sizeof(Unit) == 1) {
            const void* found = std::memchr(p_ + from, c, size_ - from);
            return found == nullptr ? size_ : static_cast<std::size_t>(static_cast<const Unit*>(found) - p_);
        }
        return static_cast<std::size_t>(std::find(p_ + from, p_ + size_, static_cast<Unit>(c)) - p_);
    }
    bool at(std::string_view word, std::size_t i) const {
        return word.size() <= size_ - i && std::equal(word.begin(), word.end(), p_ + i, [](char a, Unit b) {
                   return static_cast<Unit>(a) == b;
               });
    }
    template <std::size_t n>
    bool any_at(const std::string_view (&words)[n], std::size_t i) const {
        return i <= size_ &&
               std::any_of(words, words + n, [&](std::string_view word) { return at(word, i); });
    }

    const Unit* p_;
    std::size_t size_;
};

}  // namespace

bool may_hold_turns(const TextRef& text) {
    if (text.unit == 1) return Text<std::uint8_t>(text.data, text.size).may_hold_turns();
    if (text.unit == 2) return Text<std::uint16_t>(text.data, text.size).may_hold_turns();
    return Text<std::uint32_t>(text.data, text.size).may_hold_turns();
}

}  // namespace catmllm::pvcp
