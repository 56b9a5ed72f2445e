#include "oxidation.h"

#include <cstddef>
#include <cstdint>

#include "characters.h"
#include "number.h"

namespace catmllm::cif {
namespace {

// re.sub(r"\d?[\+,\-]?$", "", symbol)
std::string_view without_charge(std::string_view s) {
    const auto is_sign = [](char c) { return c == '+' || c == ',' || c == '-'; };
    if (!s.empty() && is_sign(s.back())) s.remove_suffix(1);
    if (!s.empty() && is_digit(static_cast<unsigned char>(s.back()))) s.remove_suffix(1);
    return s;
}

}  // namespace

// A name given twice takes the last value; names without their charge come after the others.
Status OxidationStates::read(const Block& block) {
    const Value& symbols = block[Key::kTypeSymbol];
    const Value& numbers = block[Key::kTypeOxidation];
    if (!symbols.present() || (symbols.size() > 0 && !numbers.present())) return ok();
    if (symbols.size() > Limits::kCompositions) return reject_text(Reason::kLimit);
    for (std::uint32_t i = 0; i < symbols.size(); ++i) {
        double value = 0;
        if (i >= numbers.size()) return reject_text(Reason::kUnsupported);  // IndexError
        if (!str2float(numbers[i], value)) return ok();
        states_.push_back({symbols[i], value});
    }
    const std::size_t n = states_.size();
    for (std::size_t i = 0; i < n; ++i)
        states_.push_back({without_charge(states_[i].symbol), states_[i].value});
    present_ = true;
    return ok();
}

bool OxidationStates::find(std::string_view symbol, double& value) const {
    for (std::size_t i = states_.size(); i-- > 0;) {
        if (states_[i].symbol != symbol) continue;
        value = states_[i].value;
        return true;
    }
    return false;
}

}  // namespace catmllm::cif
