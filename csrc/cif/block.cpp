#include "block.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>

#include "characters.h"
#include "number.h"

namespace catmllm::cif {
namespace {

struct KeyName {
    std::string_view name;
    Key key;
};

constexpr KeyName kKeyNames[] = {
    {"_cell_length_a", Key::kCellLengthA},
    {"_cell_length_b", Key::kCellLengthB},
    {"_cell_length_c", Key::kCellLengthC},
    {"_cell_angle_alpha", Key::kCellAngleAlpha},
    {"_cell_angle_beta", Key::kCellAngleBeta},
    {"_cell_angle_gamma", Key::kCellAngleGamma},
    {"_symmetry_cell_setting", Key::kSymmetryCellSetting},
    {"_space_group_crystal_system", Key::kSpaceGroupCrystalSystem},
    {"_symmetry_equiv_pos_as_xyz", Key::kSymops0},
    {"_symmetry_equiv_pos_as_xyz_", Key::kSymops1},
    {"_space_group_symop_operation_xyz", Key::kSymops2},
    {"_space_group_symop_operation_xyz_", Key::kSymops3},
    {"_symmetry_space_group_name_H-M", Key::kName0},
    {"_symmetry_space_group_name_H_M", Key::kName1},
    {"_symmetry_space_group_name_H-M_", Key::kName2},
    {"_symmetry_space_group_name_H_M_", Key::kName3},
    {"_space_group_name_Hall", Key::kName4},
    {"_space_group_name_Hall_", Key::kName5},
    {"_space_group_name_H-M_alt", Key::kName6},
    {"_space_group_name_H-M_alt_", Key::kName7},
    {"_symmetry_space_group_name_hall", Key::kName8},
    {"_symmetry_space_group_name_hall_", Key::kName9},
    {"_symmetry_space_group_name_h-m", Key::kName10},
    {"_symmetry_space_group_name_h-m_", Key::kName11},
    {"_space_group_IT_number", Key::kNumber0},
    {"_space_group_IT_number_", Key::kNumber1},
    {"_symmetry_Int_Tables_number", Key::kNumber2},
    {"_symmetry_Int_Tables_number_", Key::kNumber3},
    {"_atom_site_label", Key::kSiteLabel},
    {"_atom_site_type_symbol", Key::kSiteTypeSymbol},
    {"_atom_site_fract_x", Key::kSiteFractX},
    {"_atom_site_fract_y", Key::kSiteFractY},
    {"_atom_site_fract_z", Key::kSiteFractZ},
    {"_atom_site_occupancy", Key::kSiteOccupancy},
    {"_atom_site_attached_hydrogens", Key::kSiteAttachedHydrogens},
    {"_atom_type_symbol", Key::kTypeSymbol},
    {"_atom_type_oxidation_number", Key::kTypeOxidation},
    {"_atom_site_moment_label", Key::kMomentLabel},
    {"_atom_site_moment_crystalaxis_x", Key::kMomentX},
    {"_atom_site_moment_crystalaxis_y", Key::kMomentY},
    {"_atom_site_moment_crystalaxis_z", Key::kMomentZ},
    {"_space_group_symop_magn_operation.xyz", Key::kMagneticOperations},
    {"_space_group_symop_magn_centering.xyz", Key::kMagneticCentering},
    {"_space_group_magn.name_BNS", Key::kMagneticName},
    {"_space_group_magn.number_BNS", Key::kMagneticNumber},
    {"_space_group_magn.transform_BNS_Pp_abc", Key::kMagneticTransform},
};
constexpr std::size_t kTableSize = 256;
constexpr std::size_t kShortestKey = 12;

// Length and three characters tell the 46 names apart well enough for a table at a fifth full.
inline std::uint32_t hash_key(std::string_view s) {
    const std::size_t n = s.size();
    const auto c = [&](std::size_t i) {
        return static_cast<std::uint32_t>(static_cast<unsigned char>(s[i]));
    };
    if (n < kShortestKey) return 0;
    std::uint32_t h = static_cast<std::uint32_t>(n) * 2654435761u;
    h ^= (c(n - 1) | c(n - 2) << 8 | c(n - 3) << 16 | c(n / 2) << 24) * 0x9E3779B1u;
    h ^= h >> 15;
    return h * 0x85EBCA6Bu >> 24;
}

struct KeyTable {
    std::int8_t slot[kTableSize];
    KeyTable() {
        std::memset(slot, -1, sizeof slot);
        for (std::size_t i = 0; i < sizeof kKeyNames / sizeof *kKeyNames; ++i) {
            std::uint32_t h = hash_key(kKeyNames[i].name);
            while (slot[h] >= 0) h = (h + 1) % kTableSize;
            slot[h] = static_cast<std::int8_t>(i);
        }
    }
};
const KeyTable kTable;

int find_magnetic_key(std::string_view name);

// Of names as long as those of the table, at least kShortestKey characters; a call of memcmp takes twice as
// long.
bool same_name(std::string_view a, std::string_view b) {
    if (a.size() != b.size()) return false;
    for (std::size_t i = 0; i + 8 < a.size(); i += 8)
        if (word_at(a.data() + i) != word_at(b.data() + i)) return false;
    return word_at(a.data() + a.size() - 8) == word_at(b.data() + b.size() - 8);
}

int find_key(std::string_view name) {
    for (std::uint32_t h = hash_key(name); kTable.slot[h] >= 0; h = (h + 1) % kTableSize) {
        const KeyName& entry = kKeyNames[kTable.slot[h]];
        if (same_name(entry.name, name)) return static_cast<int>(entry.key);
    }
    return find_magnetic_key(name);
}

// Magnetic keys come with dots or underscores in several places; each spelling means the same.
struct MagneticName {
    std::string_view underscored;
    Key key;
};
constexpr MagneticName kMagneticNames[] = {
    {"_space_group_symop_magn_operation_xyz", Key::kMagneticOperations},
    {"_space_group_symop_magn_centering_xyz", Key::kMagneticCentering},
    {"_space_group_magn_name_BNS", Key::kMagneticName},
    {"_space_group_magn_number_BNS", Key::kMagneticNumber},
    {"_atom_site_moment_crystalaxis_x", Key::kMomentX},
    {"_atom_site_moment_crystalaxis_y", Key::kMomentY},
    {"_atom_site_moment_crystalaxis_z", Key::kMomentZ},
    {"_atom_site_moment_label", Key::kMomentLabel},
};

// Nearly no key can be one of a magnetic file: `mag`, `mom`, `mod` or `wav` must be in it.
bool may_be_magnetic(std::string_view name) {
    for (std::size_t i = 1; i + 2 < name.size(); ++i) {
        if (name[i + 1] != 'a' && name[i + 1] != 'o') continue;
        const char c = name[i];
        const char d = name[i + 2];
        if ((c == 'm' && (d == 'g' || d == 'm' || d == 'd')) || (c == 'w' && d == 'v')) return true;
    }
    return false;
}

int find_magnetic_key(std::string_view name) {
    if (!may_be_magnetic(name)) return -1;
    for (const MagneticName& entry : kMagneticNames) {
        if (entry.underscored.size() != name.size()) continue;
        std::size_t i = 0;
        while (i < name.size() && (name[i] == '.' ? '_' : name[i]) == entry.underscored[i]) ++i;
        if (i == name.size()) return static_cast<int>(entry.key);
    }
    return -1;
}

// is_magcif / is_magcif_incommensurate: by parts of key names, wherever in the name.
void note_magnetic(std::string_view key, Block& block) {
    if (!may_be_magnetic(key)) return;
    if (key.find("_magn") != std::string_view::npos) {
        if (key.find("_space_group_magn") != std::string_view::npos ||
            key.find("_space_group_symop_magn") != std::string_view::npos)
            block.magnetic = true;
    }
    if (key.find("_atom_site_moment") != std::string_view::npos) block.magnetic = true;
    if (key.find("_cell_modulation_dimension") != std::string_view::npos ||
        key.find("_cell_wave_vector") != std::string_view::npos)
        block.incommensurate = true;
}

void set_other(Block& block, std::string_view name, std::uint32_t rows, bool is_list) {
    note_magnetic(name, block);
    block.others.push_back({name, rows, is_list});
}

// A column name given k times in one loop: its list interleaves the k columns.
Value interleaved(const Token* items, const std::vector<std::string_view>& columns, std::string_view name,
                  std::uint32_t rows, Arena& arena) {
    std::uint32_t times = 0;
    for (std::string_view column : columns) times += column == name;
    const std::size_t n = std::size_t{times} * rows;
    auto* list = arena.array<Token>(n);
    std::size_t at = 0;
    for (std::uint32_t row = 0; row < rows; ++row)
        for (std::size_t c = 0; c < columns.size(); ++c)
            if (columns[c] == name) list[at++] = items[std::size_t{row} * columns.size() + c];
    return Value::column_of(list, 1, static_cast<std::uint32_t>(n));
}

}  // namespace

void Block::clear() {
    for (Value& value : values) value = Value();
    others.clear();
    header = {};
    magnetic = incommensurate = false;
}

bool Block::has_other(std::string_view name) const {
    return std::any_of(others.begin(), others.end(),
                       [&](const OtherKey& other) { return other.name == name; });
}

Status read_block(Tokenizer& tokens, Arena& arena, LoopScratch& scratch, Block& block) {
    Token* free_tokens = arena.array<Token>(tokens.most_tokens());
    Token token{};
    bool have = tokens.next(token);
    if (have) block.header = token.view().substr(5, 74);  // the first token is always `data_...`
    have = tokens.next(token);
    while (have) {
        if (!token.plain) {
            have = tokens.next(token);
            continue;
        }
        const std::string_view word = token.view();
        if (word[0] == '_') {
            if (word == "_eof") break;
            Token value{};
            if (!tokens.next(value)) value = Token{"", 0, false};
            const int slot = find_key(word);
            if (slot >= 0) {
                block.values[slot] = Value::scalar_of(value.view());
                if (slot >= static_cast<int>(Key::kMomentLabel)) note_magnetic(word, block);
            } else {
                set_other(block, word, 0, false);
            }
            have = tokens.next(token);
        } else if (word[0] == 'l' && starts_with(word, "loop_")) {
            std::vector<std::string_view>& columns = scratch.columns;
            columns.clear();
            have = tokens.next(token);
            while (have && token.plain && token.data[0] == '_') {
                if (columns.size() == Limits::kColumns) return reject_text(Reason::kLimit);
                columns.push_back(token.view());
                have = tokens.next(token);
            }
            // The items of all loops stand one after the other in a piece of the arena that the whole block
            // fits into.
            Token* items = free_tokens;
            Token* item = items;
            while (have) {
                if (token.plain) {
                    if (token.data[0] == '_' || (token.data[0] == 'l' && starts_with(token.view(), "loop_")))
                        break;
                } else {
                    const std::string_view stripped = strip(token.view());
                    token.data = stripped.data();
                    token.size = static_cast<std::uint32_t>(stripped.size());
                }
                *item++ = token;
                item = tokens.plain_values(item);
                have = tokens.next(token);
            }
            const auto n_items = static_cast<std::size_t>(item - items);
            if (columns.empty() || n_items == 0 || n_items % columns.size() != 0)
                return reject_text(Reason::kLoop);
            free_tokens = item;
            const auto n_columns = static_cast<std::uint32_t>(columns.size());
            const auto rows = static_cast<std::uint32_t>(n_items / columns.size());
            scratch.slots.clear();
            for (std::string_view column : columns)
                scratch.slots.push_back(static_cast<std::int16_t>(find_key(column)));
            for (std::uint32_t c = 0; c < n_columns; ++c) {
                const int slot = scratch.slots[c];
                if (slot < 0) {
                    set_other(block, columns[c], rows, true);
                    continue;
                }
                if (slot >= static_cast<int>(Key::kMomentLabel)) note_magnetic(columns[c], block);
                bool repeated = false;
                bool done = false;
                for (std::uint32_t b = 0; b < n_columns && !repeated; ++b) {
                    repeated = b != c && columns[b] == columns[c];
                    done = repeated && b < c;
                }
                if (done) continue;
                block.values[slot] = repeated ? interleaved(items, columns, columns[c], rows, arena)
                                              : Value::column_of(items + c, n_columns, rows);
            }
        } else {
            have = tokens.next(token);  // a stray word: pymatgen only warns
        }
    }
    return ok();
}

namespace {

// The parts of a Pauling-file symbol such as "0.8Nb + 0.2Zr": `\D+` and `\.?\d+` at index 1 of findall, or
// nothing.
bool second_run_of_non_digits(std::string_view s, std::string_view& run) {
    int found = 0;
    for (std::size_t i = 0; i < s.size();) {
        if (is_digit(static_cast<unsigned char>(s[i]))) {
            ++i;
            continue;
        }
        std::size_t j = i;
        while (j < s.size() && !is_digit(static_cast<unsigned char>(s[j]))) ++j;
        if (found++ == 1) {
            run = s.substr(i, j - i);
            return true;
        }
        i = j;
    }
    return false;
}

bool second_number(std::string_view s, std::string_view& number) {
    int found = 0;
    for (std::size_t i = 0; i < s.size();) {
        std::size_t j = i + (s[i] == '.');
        if (j >= s.size() || !is_digit(static_cast<unsigned char>(s[j]))) {
            ++i;
            continue;
        }
        while (j < s.size() && is_digit(static_cast<unsigned char>(s[j]))) ++j;
        if (found++ == 1) {
            number = s.substr(i, j - i);
            return true;
        }
        i = j;
    }
    return false;
}

std::size_t count_parts(std::string_view s) {  // len(s.split(" + "))
    std::size_t parts = 1;
    for (std::size_t at = s.find(" + "); at != std::string_view::npos; at = s.find(" + ", at + 3)) ++parts;
    return parts;
}

// re.sub(r"\([0-9]*\)", "", s)
std::string without_bracketed_digits(std::string_view s) {
    std::string out;
    for (std::size_t i = 0; i < s.size();) {
        if (s[i] == '(') {
            std::size_t j = i + 1;
            while (j < s.size() && is_digit(static_cast<unsigned char>(s[j]))) ++j;
            if (j < s.size() && s[j] == ')') {
                i = j + 1;
                continue;
            }
        }
        out += s[i++];
    }
    return out;
}

// s.replace("<sup>", "")
std::string without_tags(std::string_view s) {
    constexpr std::string_view kTag = "<sup>";
    std::string out;
    for (std::size_t i = 0; i < s.size();) {
        if (s.substr(i, kTag.size()) == kTag) {
            i += kTag.size();
        } else {
            out += s[i++];
        }
    }
    return out;
}

std::string_view keep(const std::string& s, Arena& arena) {
    char* p = arena.allocate(s.size() + 1);
    std::memcpy(p, s.data(), s.size());
    return {p, s.size()};
}

// A double that str2float reads back exactly. The number of digits does not matter, only the value.
std::string_view number_text(double value, Arena& arena) {
    char buffer[40];
    std::snprintf(buffer, sizeof buffer, "%.17g", value);
    return keep(buffer, arena);
}

constexpr Key kSiteColumns[] = {Key::kSiteLabel,  Key::kSiteTypeSymbol, Key::kSiteOccupancy,
                                Key::kSiteFractX, Key::kSiteFractY,     Key::kSiteFractZ};

// Rows whose symbol names more elements than their label are split into one row an element, at the end of the
// table.
Status pauling_rows(Block& block, Arena& arena) {
    const Value labels = block[Key::kSiteLabel];
    const Value symbols = block[Key::kSiteTypeSymbol];
    std::vector<std::uint32_t> removed;
    std::vector<std::string_view> added[6];
    for (std::uint32_t i = 0; i < labels.size(); ++i) {
        if (i >= symbols.size()) return reject_text(Reason::kSites);
        if (count_parts(symbols[i]) <= count_parts(labels[i])) continue;
        std::vector<std::pair<std::string, double>> elements;  // a dict: a repeated name keeps its place
        std::unordered_map<std::string, std::size_t> place;
        std::string_view rest = symbols[i];
        for (bool more = true; more;) {
            const std::size_t at = rest.find(" + ");
            more = at != std::string_view::npos;
            const std::string part = without_bracketed_digits(strip(more ? rest.substr(0, at) : rest));
            if (more) rest.remove_prefix(at + 3);
            std::string_view name;
            std::string_view amount;
            const std::string_view trimmed = strip(part);
            if (!second_run_of_non_digits(trimmed, name) || !second_number(trimmed, amount))
                return reject_text(Reason::kSites);
            const std::string element = without_tags(name);
            double value = 0;
            if (!python_float("0" + std::string(amount), value)) return reject_text(Reason::kNumber);
            const auto [same, added_now] = place.emplace(element, elements.size());
            if (added_now) {
                elements.emplace_back(element, value);
            } else {
                elements[same->second].second = value;
            }
        }
        for (const auto& [element, amount] : elements) {
            added[0].push_back(keep(element + "_fix" + std::to_string(added[0].size()), arena));
            added[1].push_back(keep(element, arena));
            added[2].push_back(number_text(amount, arena));
            for (int axis = 0; axis < 3; ++axis) {
                const Value& column = block[kSiteColumns[3 + axis]];
                double x = 0;
                if (i >= column.size() || !str2float(column[i], x)) return reject_text(Reason::kNumber);
                added[3 + axis].push_back(number_text(x, arena));
            }
        }
        removed.push_back(i);
    }
    if (removed.empty()) return ok();
    if (block.others.size() > Limits::kColumns) return reject_text(Reason::kLimit);
    // pymatgen deletes these rows from every list of the block, whichever loop it belongs to.
    for (std::size_t k = block.others.size(); k-- > 0;) {
        bool overwritten = false;
        for (std::size_t later = k + 1; later < block.others.size(); ++later)
            overwritten |= block.others[later].name == block.others[k].name;
        if (!overwritten && block.others[k].is_list && block.others[k].rows <= removed.back())
            return reject_text(Reason::kSites);
    }
    for (Value& value : block.values) {
        if (!value.is_list()) continue;
        if (value.size() <= removed.back()) return reject_text(Reason::kSites);
        const std::size_t n = value.size() - removed.size();
        int site = -1;
        for (int c = 0; c < 6; ++c)
            if (&value == &block[kSiteColumns[c]]) site = c;
        const std::size_t total = n + (site >= 0 ? added[site].size() : 0);
        auto* list = arena.array<Token>(total);
        std::size_t out = 0;
        for (std::uint32_t i = 0; i < value.size(); ++i)
            if (!std::binary_search(removed.begin(), removed.end(), i))
                list[out++] = value.tokens()[std::size_t{i} * value.stride()];
        if (site >= 0)
            for (std::string_view item : added[site])
                list[out++] = Token{item.data(), static_cast<std::uint32_t>(item.size()), false};
        value = Value::column_of(list, 1, static_cast<std::uint32_t>(total));
    }
    for (Key key : kSiteColumns)
        if (!block[key].is_list()) return reject_text(Reason::kSites);  // KeyError, or list added to a string
    return ok();
}

}  // namespace

Status sanitize(Block& block, Arena& arena) {
    const Value& hydrogens = block[Key::kSiteAttachedHydrogens];
    for (std::uint32_t i = 0; i < hydrogens.size(); ++i) {
        double value = 0;
        if (!str2float(hydrogens[i], value)) return reject_text(Reason::kNumber);
    }
    const Value& symbols = block[Key::kSiteTypeSymbol];
    if (symbols.present()) {
        const Value& labels = block[Key::kSiteLabel];
        if (!labels.present()) return reject_text(Reason::kSites);
        if (symbols.size() < labels.size()) return reject_text(Reason::kSites);
        bool split = false;
        for (std::uint32_t i = 0; i < labels.size() && !split; ++i) {
            const std::string_view symbol = symbols[i];
            split = symbol.size() > 3 && symbol.find(" + ") != std::string_view::npos &&
                    count_parts(symbol) > count_parts(labels[i]);
        }
        if (split) {
            const Status status = pauling_rows(block, arena);
            if (!status.ok()) return status;
        }
    }
    return ok();
}

}  // namespace catmllm::cif
