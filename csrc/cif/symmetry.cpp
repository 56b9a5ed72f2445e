#include "symmetry.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "characters.h"
#include "number.h"
#include "tables.h"

namespace catmllm::cif {
namespace {

constexpr AffineOperation kIdentity = {{1, 0, 0, 0, 1, 0, 0, 0, 1}, {0, 0, 0}};

bool is_numeral(char c) { return c == '.' || is_digit(static_cast<unsigned char>(c)); }
bool is_axis(char c) { return c >= 'x' && c <= 'z'; }

// float(a) or float(a) / float(b) for a non-empty b, both of digits and points.
Status quotient(std::string_view a, std::string_view b, double& value) {
    const auto read = [](std::string_view s, double& number) {
        return plain_decimal(s.data(), s.data() + s.size(), number) || python_float(s, number);
    };
    if (!read(a, value)) return skip_block(Reason::kSymmetry);
    if (b.empty()) return ok();
    double divisor = 0;
    if (!read(b, divisor)) return skip_block(Reason::kSymmetry);
    if (divisor == 0) return reject_text(Reason::kSymmetry);  // ZeroDivisionError
    value /= divisor;
    return ok();
}

std::size_t skip_numerals(std::string_view s, std::size_t i) {
    while (i < s.size() && is_numeral(s[i])) ++i;
    return i;
}

// Every match of ([+-]?)([\d\.]*)/?([\d\.]*)([x-z]), left to right.
Status rotation_row(std::string_view s, std::size_t row, AffineOperation& operation) {
    for (std::size_t i = 0; i < s.size();) {
        const std::size_t digits = i + (s[i] == '+' || s[i] == '-');
        const std::size_t a_end = skip_numerals(s, digits);
        std::size_t b_start = a_end;
        if (b_start < s.size() && s[b_start] == '/') ++b_start;
        const std::size_t b_end = b_start > a_end ? skip_numerals(s, b_start) : b_start;
        if (b_end < s.size() && is_axis(s[b_end])) {
            double factor = s[i] == '-' ? -1.0 : 1.0;
            if (a_end > digits) {
                double value = 0;
                const Status status =
                    quotient(s.substr(digits, a_end - digits), s.substr(b_start, b_end - b_start), value);
                if (!status.ok()) return status;
                factor *= value;
            }
            if (row >= 3) return reject_text(Reason::kSymmetry);  // IndexError
            operation.rotation[3 * row + static_cast<std::size_t>(s[b_end] - 'x')] = factor;
            i = b_end + 1;
        } else {  // what begins later and ends at the same place cannot match either
            i = std::max(b_start > a_end ? b_start : a_end, i + 1);
        }
    }
    return ok();
}

// Every match of ([+-]?)([\d\.]+)/?([\d\.]*)(?![x-z]), with the regular expression's backtracking: in front
// of an axis the last numeral is given back.
Status translation_row(std::string_view s, std::size_t row, AffineOperation& operation) {
    for (std::size_t i = 0; i < s.size();) {
        const std::size_t digits = i + (s[i] == '+' || s[i] == '-');
        std::size_t a_end = skip_numerals(s, digits);
        if (a_end == digits) {
            ++i;
            continue;
        }
        std::size_t b_start = a_end;
        std::size_t b_end = a_end;
        std::size_t end = a_end;
        const auto axis_at = [&](std::size_t k) { return k < s.size() && is_axis(s[k]); };
        if (a_end < s.size() && s[a_end] == '/') {
            b_start = a_end + 1;
            b_end = skip_numerals(s, b_start);
            end = b_end;
            if (axis_at(b_end)) {
                if (b_end > b_start) {
                    --b_end;
                    end = b_end;
                } else {  // the slash is given back
                    b_start = b_end = end = a_end;
                }
            }
        } else if (axis_at(a_end)) {
            if (a_end - digits < 2) {
                i = a_end;
                continue;
            }
            --a_end;
            b_start = b_end = end = a_end;
        }
        double value = 0;
        const Status status =
            quotient(s.substr(digits, a_end - digits), s.substr(b_start, b_end - b_start), value);
        if (!status.ok()) return status;
        if (row >= 3) return reject_text(Reason::kSymmetry);
        operation.translation[row] = s[i] == '-' ? -value : value;
        i = end;
    }
    return ok();
}

// One component of "x, y, z", without its spaces and in lower case.
Status read_component(std::string_view text, std::size_t row, AffineOperation& operation) {
    char small[256];
    std::string large;
    char* s = small;
    if (text.size() > sizeof small) {
        large.resize(text.size());
        s = large.data();
    }
    std::size_t n = 0;
    for (char c : text)
        if (c != ' ') s[n++] = to_lower(static_cast<unsigned char>(c));
    const Status status = rotation_row({s, n}, row, operation);
    return status.ok() ? translation_row({s, n}, row, operation) : status;
}

void append_list(std::uint32_t list, std::vector<AffineOperation>& operations) {
    for (std::uint32_t i = tables::kListStarts[list]; i < tables::kListStarts[list + 1]; ++i) {
        const tables::Operation& source = tables::kOperations[tables::kListMembers[i]];
        AffineOperation operation;
        for (int k = 0; k < 9; ++k) operation.rotation[k] = source.rotation[k];
        std::memcpy(operation.translation, source.translation, sizeof operation.translation);
        operations.push_back(operation);
    }
}

bool append_named(std::string_view name, std::vector<AffineOperation>& operations) {
    char compact[32];  // no name in the table is longer than 16
    std::size_t n = 0;
    for (char c : name) {
        if (is_space(static_cast<unsigned char>(c)) || c == '_') continue;
        if (n == sizeof compact) return false;
        compact[n++] = c;
    }
    const std::string_view wanted(compact, n);
    const auto* end =
        tables::kSpaceGroupNames + sizeof tables::kSpaceGroupNames / sizeof *tables::kSpaceGroupNames;
    const auto* found = std::lower_bound(tables::kSpaceGroupNames, end, wanted,
                                         [](const tables::SpaceGroupName& entry, std::string_view key) {
                                             return std::string_view(entry.name) < key;
                                         });
    if (found == end || wanted != found->name) return false;
    append_list(found->list, operations);
    return true;
}

// One string or a list of strings, each by `read`. kSkipBlock for ValueError.
template <class Read>
Status operations_of(const Value& value, KnownComponents& known, std::vector<AffineOperation>& operations,
                     Read read) {
    const bool list = value.is_list();
    const std::uint32_t n = list ? value.size() : 1;
    if (n > Limits::kOperations) return reject_text(Reason::kLimit);
    for (std::uint32_t i = 0; i < n; ++i) {
        AffineOperation operation;
        const Status status = read(list ? value[i] : value.scalar(), known, operation);
        if (!status.ok()) return status;
        operations.push_back(operation);
    }
    return ok();
}

// int(text) is 1 or -1, as Python reads it
bool is_time_reversal(std::string_view text) {
    std::string_view s = strip(text);
    if (!s.empty() && (s[0] == '+' || s[0] == '-')) s.remove_prefix(1);
    if (s.empty() || s.back() != '1') return false;
    for (std::size_t i = 0; i + 1 < s.size(); ++i)
        if (s[i] != '0' && !(s[i] == '_' && i > 0 && s[i - 1] == '0')) return false;
    return true;
}

Status operation_from_xyzt(std::string_view text, KnownComponents& known, AffineOperation& operation) {
    const std::size_t comma = text.rfind(',');
    const Status status = operation_from_xyz(text.substr(0, comma), known, operation);
    if (!status.ok()) return status;
    if (comma == std::string_view::npos || !is_time_reversal(text.substr(comma + 1)))
        return reject_text(Reason::kMagnetic);
    return ok();
}

}  // namespace

bool AffineOperation::is_identity() const { return std::memcmp(this, &kIdentity, sizeof kIdentity) == 0; }

Status operation_from_xyz(std::string_view text, KnownComponents& known, AffineOperation& operation) {
    operation = AffineOperation{};
    const std::string_view trimmed = strip(text);
    std::size_t row = 0;
    for (std::size_t start = 0; start <= trimmed.size(); ++row) {
        std::size_t end = start;
        while (end < trimmed.size() && trimmed[end] != ',') ++end;
        const std::string_view component = trimmed.substr(start, end - start);
        start = end + 1;
        if (row >= 3 || component.size() - 1 >= 16) {
            const Status status = read_component(component, row, operation);
            if (!status.ok()) return status;
            continue;
        }
        const std::size_t size = component.size();
        const std::uint64_t words[2] = {left_word(component.data(), std::min<std::size_t>(size, 8)),
                                        size > 8 ? left_word(component.data() + 8, size - 8) : 0};
        KnownComponents::Component& slot =
            known.slots[(words[0] * 0x9E3779B97F4A7C15ull ^ words[1] * 0xC2B2AE3D27D4EB4Full) >> 56];
        if (slot.size != size || slot.words[0] != words[0] || slot.words[1] != words[1]) {
            const Status status = read_component(component, row, operation);
            if (!status.ok()) return status;
            std::memcpy(slot.rotation, operation.rotation + 3 * row, sizeof slot.rotation);
            slot.translation = operation.translation[row];
            std::memcpy(slot.words, words, sizeof words);
            slot.size = static_cast<std::uint32_t>(size);
        } else {
            std::memcpy(operation.rotation + 3 * row, slot.rotation, sizeof slot.rotation);
            operation.translation[row] = slot.translation;
        }
    }
    return ok();
}

Status symmetry_operations(const Block& block, KnownComponents& known,
                           std::vector<AffineOperation>& operations) {
    operations.clear();
    for (int i = 0; i < 4; ++i) {
        const Value& value = block[key_at(Key::kSymops0, i)];
        if (!value.truthy()) continue;
        const Status status = operations_of(value, known, operations, operation_from_xyz);
        if (status.outcome == Outcome::kRejectText) return status;
        if (status.ok()) break;
        operations.clear();
    }
    if (!operations.empty()) return ok();
    for (int i = 0; i < 12; ++i) {
        const Value& value = block[key_at(Key::kName0, i)];
        if (!value.truthy()) continue;
        if (value.is_list()) return reject_text(Reason::kSymmetry);  // re.sub on a list
        if (append_named(value.scalar(), operations)) return ok();
    }
    for (int i = 0; i < 4; ++i) {
        const Value& value = block[key_at(Key::kNumber0, i)];
        if (!value.truthy()) continue;
        double number = 0;
        const bool read = value.is_list()
                              ? value.size() == 1 && value[0] != "." && str2float(value[0], number)
                              : str2float(value.scalar(), number);
        if (!read || std::isnan(number)) continue;
        if (std::isinf(number)) return reject_text(Reason::kSymmetry);  // OverflowError
        number = std::trunc(number);
        if (number < 1 || number > 230) continue;
        append_list(tables::kSpaceGroupNumbers[static_cast<int>(number) - 1], operations);
        return ok();
    }
    operations.push_back(kIdentity);
    return ok();
}

Status magnetic_operations(const Block& block, KnownComponents& known,
                           std::vector<AffineOperation>& operations) {
    operations.clear();
    const Value& explicit_operations = block[Key::kMagneticOperations];
    if (explicit_operations.truthy()) {
        Status status = operations_of(explicit_operations, known, operations, operation_from_xyzt);
        if (!status.ok()) return status;
        const Value& centering = block[Key::kMagneticCentering];
        if (!centering.truthy()) return ok();
        std::vector<AffineOperation> centers;
        status = operations_of(centering, known, centers, operation_from_xyzt);
        if (!status.ok()) return status;
        if (centers.size() * operations.size() > Limits::kOperations) return reject_text(Reason::kLimit);
        std::vector<AffineOperation> all;
        all.reserve(centers.size() * operations.size());
        for (const AffineOperation& operation : operations) {
            for (const AffineOperation& center : centers) {
                AffineOperation sum = operation;
                for (int k = 0; k < 3; ++k) {
                    const double t = operation.translation[k] + center.translation[k];
                    sum.translation[k] = t - std::floor(t);
                }
                all.push_back(sum);
            }
        }
        operations.swap(all);
        return ok();
    }
    if (block[Key::kMagneticName].truthy() || block[Key::kMagneticNumber].truthy())
        return magnetic_group_operations(block, operations);
    operations.push_back(kIdentity);
    return ok();
}

bool is_lattice_attribute(std::string_view name) {
    const auto* end =
        tables::kLatticeAttributes + sizeof tables::kLatticeAttributes / sizeof *tables::kLatticeAttributes;
    const auto* found = std::lower_bound(
        tables::kLatticeAttributes, end, name,
        [](const char* entry, std::string_view key) { return std::string_view(entry) < key; });
    return found != end && name == *found;
}

}  // namespace catmllm::cif
