// Magnetic space groups by name or number, in another setting where the file says so: pymatgen's
// MagneticSpaceGroup and JonesFaithfulTransformation. Time reversal moves no site and is left out.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "../geometry/lattice.h"
#include "characters.h"
#include "number.h"
#include "symmetry.h"
#include "tables.h"

namespace catmllm::cif {
namespace {

// ------------------------------------------------------------------------------------------ which group

// int(text)
bool python_int(std::string_view text, long& value) {
    std::string_view s = strip(text);
    const bool negative = !s.empty() && s[0] == '-';
    if (!s.empty() && (s[0] == '+' || s[0] == '-')) s.remove_prefix(1);
    if (s.empty() || s.size() > 12) return false;
    value = 0;
    for (std::size_t i = 0; i < s.size(); ++i) {
        if (s[i] == '_' && i > 0 && i + 1 < s.size() && s[i - 1] != '_') continue;
        if (!is_digit(static_cast<unsigned char>(s[i]))) return false;
        value = 10 * value + (s[i] - '0');
    }
    if (negative) value = -value;
    return true;
}

const tables::MagneticGroup* group_of_number(long first, long second) {
    const auto* begin = std::begin(tables::kMagneticGroups);
    const auto* end = std::end(tables::kMagneticGroups);
    const auto key = std::make_pair(first, second);
    const auto* found =
        std::lower_bound(begin, end, key, [](const tables::MagneticGroup& group, auto wanted) {
            return std::make_pair(long{group.first}, long{group.second}) < wanted;
        });
    return found != end && found->first == first && found->second == second ? found : nullptr;
}

const tables::MagneticGroup* group_of_name(std::string_view name) {
    std::string compact;
    for (char c : name)
        if (!is_space(static_cast<unsigned char>(c))) compact += c;
    const auto* begin = std::begin(tables::kMagneticNames);
    const auto* end = std::end(tables::kMagneticNames);
    const auto* found =
        std::lower_bound(begin, end, compact, [](std::uint16_t index, const std::string& wanted) {
            return std::string_view(tables::kMagneticGroups[index].name) < wanted;
        });
    if (found == end || compact != tables::kMagneticGroups[*found].name) return nullptr;
    return &tables::kMagneticGroups[*found];
}

// ------------------------------------------------------------------------------------------ another setting

// A number, or a combination of a, b, c.
struct Term {
    bool vector = false;
    double x[3] = {0, 0, 0};  // of a number the first
};

// One axis of a transform, `2/3a+1/3b`, after pymatgen's insertion of `*`: sums, products, quotients,
// brackets.
class Axis {
  public:
    explicit Axis(std::string_view text) : s_(text) {}
    bool read(Term& value) { return sum(value) && at_ == s_.size() && value.vector; }

  private:
    bool sum(Term& value) {
        if (!product(value)) return false;
        while (at_ < s_.size() && (s_[at_] == '+' || s_[at_] == '-')) {
            const double sign = s_[at_++] == '-' ? -1 : 1;
            Term other;
            if (!product(other) || other.vector != value.vector) return false;
            for (int k = 0; k < 3; ++k) value.x[k] += sign * other.x[k];
        }
        return true;
    }
    bool product(Term& value) {
        if (!factor(value)) return false;
        while (at_ < s_.size() && (s_[at_] == '*' || s_[at_] == '/')) {
            const bool divide = s_[at_++] == '/';
            Term other;
            if (!factor(other) || (other.vector && (divide || value.vector))) return false;
            if (divide && other.x[0] == 0) return false;
            if (other.vector) std::swap(value, other);
            const double times = other.x[0];
            for (double& x : value.x) x = divide ? x / times : x * times;
        }
        return true;
    }
    bool factor(Term& value) {
        if (++depth_ > 100) return false;
        double sign = 1;
        for (; at_ < s_.size() && (s_[at_] == '+' || s_[at_] == '-'); ++at_)
            sign = s_[at_] == '-' ? -sign : sign;
        if (at_ == s_.size()) return false;
        const char c = s_[at_];
        if (c == '(') {
            ++at_;
            if (!sum(value) || at_ == s_.size() || s_[at_] != ')') return false;
            ++at_;
        } else if (c >= 'a' && c <= 'c') {
            ++at_;
            value.vector = true;
            value.x[c - 'a'] = 1;
            // `a2` and `ab` are other names
            if (at_ < s_.size() && (is_digit(static_cast<unsigned char>(s_[at_])) ||
                                    is_lower(static_cast<unsigned char>(s_[at_]))))
                return false;
        } else {
            const std::size_t start = at_;
            while (at_ < s_.size() && (is_digit(static_cast<unsigned char>(s_[at_])) || s_[at_] == '.'))
                ++at_;
            const std::string_view digits = s_.substr(start, at_ - start);
            const bool leading_zero = digits.size() > 1 && digits[0] == '0' &&
                                      digits.find('.') == std::string_view::npos &&
                                      digits.find_first_not_of('0') != std::string_view::npos;
            if (digits.empty() || leading_zero || !python_float(digits, value.x[0])) return false;
        }
        for (double& x : value.x) x *= sign;
        --depth_;
        return true;
    }

    std::string_view s_;
    std::size_t at_ = 0;
    int depth_ = 0;
};

// The text of an axis as it is handed to sympy: `*` where it is left out, other characters gone.
std::string axis_text(std::string_view text) {
    std::string out;
    const auto is_word = [](char c) {
        return is_alpha(static_cast<unsigned char>(c)) || is_digit(static_cast<unsigned char>(c)) || c == '_';
    };
    const auto is_axis = [](char c) { return c >= 'a' && c <= 'c'; };
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        const char before = i == 0 ? ' ' : text[i - 1];
        const bool times = (c == '(' && (is_word(before) || before == ')')) ||
                           (before == ')' && is_word(c)) ||
                           (is_axis(c) && (is_digit(static_cast<unsigned char>(before)) || is_axis(before)));
        if (times) out += '*';
        if (is_digit(static_cast<unsigned char>(c)) || std::strchr("+-*/.abc()", c) != nullptr) out += c;
    }
    return out;
}

// float(Fraction(text))
bool fraction(std::string_view text, double& value) {
    const std::string_view s = strip(text);
    const std::size_t slash = s.find('/');
    long numerator = 0;
    long denominator = 1;
    if (slash == std::string_view::npos) {
        const bool plain = !s.empty() && s.find_first_not_of("0123456789+-._eE") == std::string_view::npos;
        return plain && python_float(s, value);
    }
    const std::string_view below = s.substr(slash + 1);
    if (below.empty() || !is_digit(static_cast<unsigned char>(below[0])) ||
        is_space(static_cast<unsigned char>(s[slash - (slash > 0)])))
        return false;
    if (!python_int(s.substr(0, slash), numerator) || !python_int(below, denominator) || denominator == 0)
        return false;
    value = static_cast<double>(numerator) / static_cast<double>(denominator);
    return true;
}

struct Setting {
    double axes[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};  // P: its columns are the new axes
    double inverse[9] = {1, 0, 0, 0, 1, 0, 0, 0, 1};
    double origin[3] = {0, 0, 0};
};

// "P;p" as in `-b+c,a+c,-a+b+c;0,0,0`; false for what raises ValueError.
bool read_setting(std::string_view text, Setting& setting) {
    const std::size_t semicolon = text.find(';');
    if (semicolon == std::string_view::npos || text.find(';', semicolon + 1) != std::string_view::npos)
        return false;
    std::string_view parts[2] = {text.substr(0, semicolon), text.substr(semicolon + 1)};
    for (int part = 0; part < 2; ++part) {
        std::size_t start = 0;
        for (int k = 0; k < 3; ++k) {
            const std::size_t comma = parts[part].find(',', start);
            if ((comma == std::string_view::npos) != (k == 2)) return false;
            const std::string_view item = parts[part].substr(start, comma - start);
            start = comma + 1;
            if (part == 1) {
                if (!fraction(item, setting.origin[k])) return false;
                continue;
            }
            const std::string axis = axis_text(item);
            Term term;
            if (axis.size() > 1000 || !Axis(axis).read(term)) return false;
            if (term.x[0] == 0 && term.x[1] == 0 && term.x[2] == 0 && axis.find('0') == std::string::npos)
                return false;
            for (int i = 0; i < 3; ++i) setting.axes[3 * i + k] = term.x[i];
        }
    }
    if (!geometry::invert(setting.axes, setting.inverse)) return false;
    return std::all_of(setting.inverse, setting.inverse + 9, [](double x) { return std::isfinite(x); });
}

void multiply(const double* a, const double* b, double* out) {
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j)
            out[3 * i + j] = a[3 * i] * b[j] + a[3 * i + 1] * b[3 + j] + a[3 * i + 2] * b[6 + j];
}

// JonesFaithfulTransformation.transform_symmop
AffineOperation in_setting(const AffineOperation& operation, const Setting& setting) {
    double half[9];
    AffineOperation out;
    multiply(setting.inverse, operation.rotation, half);
    multiply(half, setting.axes, out.rotation);
    double shift[3];
    for (int i = 0; i < 3; ++i) {
        shift[i] = operation.translation[i];
        for (int j = 0; j < 3; ++j)
            shift[i] += (operation.rotation[3 * i + j] - (i == j)) * setting.origin[j];
    }
    for (int i = 0; i < 3; ++i) {
        const double* row = setting.inverse + 3 * i;
        const double t = row[0] * shift[0] + row[1] * shift[1] + row[2] * shift[2];
        out.translation[i] = t - std::floor(t);
    }
    return out;
}

}  // namespace

Status magnetic_group_operations(const Block& block, std::vector<AffineOperation>& operations) {
    const Value& name = block[Key::kMagneticName];
    const Value& number = block[Key::kMagneticNumber];
    const Value& transform = block[Key::kMagneticTransform];
    const tables::MagneticGroup* group = nullptr;
    if (name.truthy()) {
        if (name.is_list()) return reject_text(Reason::kMagnetic);
        group = group_of_name(name.scalar());
    } else {
        if (number.is_list()) return reject_text(Reason::kMagnetic);  // a list has no split()
        const std::string_view text = number.scalar();
        long parts[2] = {0, 0};
        std::size_t count = 0;
        for (std::size_t start = 0; start <= text.size(); ++count) {
            const std::size_t point = std::min(text.find('.', start), text.size());
            long part = 0;
            if (!python_int(text.substr(start, point - start), part)) return skip_block(Reason::kMagnetic);
            if (count < 2) parts[count] = part;
            start = point + 1;
        }
        if (count < 2) return reject_text(Reason::kMagnetic);  // IndexError
        group = group_of_number(parts[0], parts[1]);
    }
    const bool as_listed = transform.present() && !transform.is_list() && transform.scalar() == "a,b,c;0,0,0";
    if (as_listed && block.has_other("_space_group_magn.transform_BNS_Pp"))
        return reject_text(Reason::kMagnetic);
    if (group == nullptr) return reject_text(Reason::kMagnetic);  // no row of the table: TypeError
    Setting setting;
    if (!as_listed && transform.present() && !transform.is_list() &&
        !read_setting(transform.scalar(), setting))
        return skip_block(Reason::kMagnetic);

    const auto& lattice = tables::kMagneticLattices[group->lattice];
    for (int v = -1; v < lattice.size; ++v) {
        for (std::uint32_t i = tables::kMagneticStarts[group->list];
             i < tables::kMagneticStarts[group->list + 1]; ++i) {
            const tables::Operation& source = tables::kMagneticOperations[tables::kMagneticMembers[i]];
            AffineOperation operation;
            for (int k = 0; k < 9; ++k) operation.rotation[k] = source.rotation[k];
            for (int k = 0; k < 3; ++k)
                operation.translation[k] = source.translation[k] + (v < 0 ? 0.0 : lattice.vectors[v][k]);
            operations.push_back(in_setting(operation, setting));
        }
    }
    return ok();
}

}  // namespace catmllm::cif
