#include "number.h"

#include <charconv>
#include <clocale>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>

#include "characters.h"

namespace catmllm::cif {
namespace {

bool equals_lower(std::string_view s, std::string_view lower) {
    if (s.size() != lower.size()) return false;
    for (std::size_t i = 0; i < s.size(); ++i)
        if (to_lower(static_cast<unsigned char>(s[i])) != lower[i]) return false;
    return true;
}

// Digits with single underscores between them, from `i`; false for a misplaced underscore. `n` counts the
// digits.
bool skip_digits(std::string_view s, std::size_t& i, std::size_t& n) {
    n = 0;
    while (i < s.size()) {
        if (is_digit(static_cast<unsigned char>(s[i]))) {
            ++n;
            ++i;
        } else if (s[i] == '_') {
            if (n == 0 || i + 1 >= s.size() || !is_digit(static_cast<unsigned char>(s[i + 1]))) return false;
            ++i;
        } else {
            break;
        }
    }
    return true;
}

double to_double(const char* first, const char* last, bool exponent_is_negative) {
// libc++ has had from_chars for double since LLVM 20, which Apple's compilers follow late.
#if defined(__cpp_lib_to_chars) && __cpp_lib_to_chars >= 201611L && !defined(CATMLLM_STRTOD)
    double value = 0;
    const auto result = std::from_chars(first, last, value);
    if (result.ec == std::errc::result_out_of_range) {
        // from_chars leaves the value alone: underflow is 0, overflow inf, told apart by the size of the
        // mantissa too.
        bool nonzero = false;
        long long leading = 0;
        bool point = false;
        for (const char* p = first; p < last && *p != 'e' && *p != 'E'; ++p) {
            if (*p == '.') {
                point = true;
            } else if (nonzero) {
                leading += !point;
            } else if (*p != '0') {
                nonzero = true;
                leading += !point;
            } else {
                leading -= point;
            }
        }
        long long exponent = 0;
        for (const char* p = first; p < last; ++p) {
            if (*p != 'e' && *p != 'E') continue;
            for (++p; p < last; ++p)
                if (is_digit(static_cast<unsigned char>(*p)) && exponent < 1'000'000'000'000LL)
                    exponent = exponent * 10 + (*p - '0');
        }
        if (exponent_is_negative) exponent = -exponent;
        if (!nonzero) return 0.0;
        return leading + exponent > 0 ? std::numeric_limits<double>::infinity() : 0.0;
    }
    return value;
#else
    (void)exponent_is_negative;
    std::string text(first, last);
    const std::size_t point = text.find('.');  // strtod wants the one of the process's locale
    if (point != std::string::npos) text.replace(point, 1, std::localeconv()->decimal_point);
    return std::strtod(text.c_str(), nullptr);
#endif
}

}  // namespace

bool python_float(std::string_view text, double& value) {
    std::string_view s = strip(text);
    if (s.empty()) return false;
    bool negative = false;
    if (s[0] == '+' || s[0] == '-') {
        negative = s[0] == '-';
        s.remove_prefix(1);
    }
    if (equals_lower(s, "inf") || equals_lower(s, "infinity")) {
        value = negative ? -std::numeric_limits<double>::infinity() : std::numeric_limits<double>::infinity();
        return true;
    }
    if (equals_lower(s, "nan")) {
        value = std::numeric_limits<double>::quiet_NaN();
        return true;
    }
    std::size_t i = 0;
    std::size_t whole = 0;
    std::size_t fraction = 0;
    bool exponent_is_negative = false;
    if (!skip_digits(s, i, whole)) return false;
    if (i < s.size() && s[i] == '.') {
        ++i;
        if (!skip_digits(s, i, fraction)) return false;
    }
    if (whole + fraction == 0) return false;
    if (i < s.size() && (s[i] == 'e' || s[i] == 'E')) {
        ++i;
        if (i < s.size() && (s[i] == '+' || s[i] == '-')) exponent_is_negative = s[i++] == '-';
        std::size_t digits = 0;
        if (!skip_digits(s, i, digits) || digits == 0) return false;
    }
    if (i != s.size()) return false;
    char buffer[64];
    std::string longer;
    char* out = buffer;
    if (s.size() >= sizeof buffer) {
        longer.resize(s.size() + 1);
        out = longer.data();
    }
    std::size_t n = 0;
    for (std::size_t k = 0; k < s.size(); ++k) {
        if (s[k] == '_') continue;
        if (s[k] == '+') continue;  // from_chars knows no plus sign, here only in the exponent
        out[n++] = s[k];
    }
    value = to_double(out, out + n, exponent_is_negative);
    if (negative) value = -value;
    return true;
}

bool str2float(std::string_view text, double& value) {
    if (plain_decimal(text.data(), text.data() + text.size(), value)) return true;
    const std::size_t bracket = text.find('(');
    std::string_view number = text;
    if (bracket != std::string_view::npos && bracket + 1 < text.size()) number = text.substr(0, bracket);
    if (python_float(number, value)) return true;
    if (strip(text) == ".") {
        value = 0.0;
        return true;
    }
    return false;
}

}  // namespace catmllm::cif
