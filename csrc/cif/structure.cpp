#include "structure.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "../geometry/rounding.h"
#include "characters.h"
#include "decimals.h"
#include "number.h"

namespace catmllm::cif {
namespace {

constexpr double kSiteTolerance = 1e-4;
constexpr double kAmountTolerance = 1e-8;
constexpr std::uint32_t kEnd = 0xffffffff;
constexpr std::uint32_t kFewPoints = 12;  // up to here comparing with all is quicker than a table
constexpr double kThinnest = 0.01;        // Å

constexpr Key key_at(Key first, int offset) { return static_cast<Key>(static_cast<int>(first) + offset); }

// ---------------------------------------------------------------------------------------------- the cell

bool value_as_number(const Value& value, double& number) {
    if (!value.is_list()) return str2float(value.scalar(), number);
    return value.size() == 1 && strip(value[0]) != "." && str2float(value[0], number);
}

struct Setting {
    const char* name;
    const char* arguments;  // which of the six parameters, by index
};
constexpr Setting kSettings[] = {{"cubic", "0"},         {"tetragonal", "02"}, {"orthorhombic", "012"},
                                 {"monoclinic", "0124"}, {"hexagonal", "02"},  {"rhombohedral", "03"}};

// Lattice.<setting>(...) with the parameters that the file does give.
Status lattice_of_setting(const Block& block, const Setting& setting, geometry::Lattice& lattice) {
    double given[6] = {0, 0, 0, 0, 0, 0};
    for (const char* p = setting.arguments; *p; ++p) {
        const Value& value = block[key_at(Key::kCellLengthA, *p - '0')];
        // A missing one makes pymatgen call the constructor with too few arguments: TypeError.
        if (!value.present()) return reject_text(Reason::kCell);
        if (!value_as_number(value, given[*p - '0'])) return skip_block(Reason::kCell);
    }
    const double a = given[0];
    const std::string_view name = setting.name;
    if (name == "cubic") {
        lattice = geometry::Lattice{{a, 0, 0, 0, a, 0, 0, 0, a}};
        return ok();
    }
    double lengths[3] = {a, a, given[2]};
    double angles[3] = {90, 90, 90};
    if (name == "orthorhombic" || name == "monoclinic") lengths[1] = given[1];
    if (name == "monoclinic") angles[1] = given[4];
    if (name == "hexagonal") angles[2] = 120;
    if (name == "rhombohedral") {
        lengths[2] = a;
        angles[0] = angles[1] = angles[2] = given[3];
    }
    lattice = geometry::lattice_from_parameters(lengths, angles);
    return ok();
}

// CifParser.get_lattice; `found` false where it returns None.
Status read_lattice(const Block& block, geometry::Lattice& lattice, bool& found) {
    double parameters[6];
    found = true;
    bool complete = true;
    for (int i = 0; i < 6 && complete; ++i) {
        const Value& value = block[key_at(Key::kCellLengthA, i)];
        complete = value.present();
        if (complete && !value_as_number(value, parameters[i])) return skip_block(Reason::kCell);
    }
    if (complete) {
        lattice = geometry::lattice_from_parameters(parameters, parameters + 3);
        return ok();
    }
    found = false;
    for (Key key : {Key::kSymmetryCellSetting, Key::kSpaceGroupCrystalSystem}) {
        const Value& value = block[key];
        if (!value.truthy()) return ok();
        if (value.is_list()) return reject_text(Reason::kCell);  // a list has no lower()
        std::string name(value.scalar());
        for (char& c : name) c = to_lower(static_cast<unsigned char>(c));
        for (const Setting& setting : kSettings) {
            if (name != setting.name) continue;
            found = true;
            return lattice_of_setting(block, setting, lattice);
        }
        if (is_lattice_attribute(name)) return reject_text(Reason::kCell);  // called with the wrong arguments
    }
    return ok();
}

// ------------------------------------------------------------------------------------------- oxidation states

// CifParser._parse_oxi_states. A name given twice takes the last value; names without their charge come after the
// others.
class OxidationStates {
  public:
    Status read(const Block& block) {
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
        for (std::size_t i = 0; i < n; ++i) states_.push_back({without_charge(states_[i].symbol), states_[i].value});
        present_ = true;
        return ok();
    }
    bool present() const { return present_; }
    bool find(std::string_view symbol, double& value) const {
        for (std::size_t i = states_.size(); i-- > 0;) {
            if (states_[i].symbol != symbol) continue;
            value = states_[i].value;
            return true;
        }
        return false;
    }

  private:
    struct State {
        std::string_view symbol;
        double value;
    };
    // re.sub(r"\d?[\+,\-]?$", "", symbol)
    static std::string_view without_charge(std::string_view s) {
        const auto is_sign = [](char c) { return c == '+' || c == ',' || c == '-'; };
        if (!s.empty() && is_sign(s.back())) s.remove_suffix(1);
        if (!s.empty() && is_digit(static_cast<unsigned char>(s.back()))) s.remove_suffix(1);
        return s;
    }
    std::vector<State> states_;
    bool present_ = false;
};

// --------------------------------------------------------------------------------------------- site positions

// Looks up points by their place in the unit cube, modulo 1: chains of a hash table over small cubes.
class PointTable {
  public:
    PointTable(std::vector<std::uint32_t>& table, std::vector<std::uint32_t>& next, std::size_t expected)
        : table_(table), next_(next) {
        std::size_t size = 64;
        while (size < 2 * expected) size *= 2;
        table_.assign(size, kEnd);
        next_.clear();
        mask_ = static_cast<std::uint32_t>(size - 1);
        // Coarse cubes are almost never straddled; fine ones keep chains short when there are many points.
        cubes_ = expected <= 4096 ? 64 : 4096;
        margin_ = 1.5 * kSiteTolerance * cubes_;
    }

    void insert(const double* wrapped) {
        const auto id = static_cast<std::uint32_t>(next_.size());
        std::uint32_t& head = table_[slot(cube(wrapped[0]), cube(wrapped[1]), cube(wrapped[2]))];
        next_.push_back(head);
        head = id;
    }

    // Calls visit(id) for every point that may be within the tolerance; stops when it returns true. False with `full`
    // set when a chain is longer than the limit.
    template <class Visit>
    bool search(const double* wrapped, bool& full, Visit visit) const {
        std::int32_t at[3];
        std::int32_t beside[3] = {0, 0, 0};  // -1 or 1 where the neighbouring cube is as near
        bool alone = true;
        for (int k = 0; k < 3; ++k) {
            const double y = wrapped[k] * cubes_ + kShift;
            at[k] = static_cast<std::int32_t>(y);
            const double inside = y - at[k];
            if (inside < margin_) beside[k] = -1;
            if (inside > 1 - margin_) beside[k] = 1;
            alone &= beside[k] == 0;
        }
        if (alone) return visit_chain(at[0], at[1], at[2], full, visit);
        for (int code = 0; code < 8; ++code) {
            std::int32_t c[3];
            bool repeated = false;
            for (int k = 0; k < 3; ++k) {
                const bool step = code >> k & 1;
                repeated |= step && beside[k] == 0;
                c[k] = at[k] + (step ? beside[k] : 0);
            }
            if (repeated) continue;
            if (visit_chain(c[0], c[1], c[2], full, visit)) return true;
            if (full) return false;
        }
        return false;
    }

  private:
    // No simple fraction lies on a face between cubes, where all neighbours would have to be looked at.
    static constexpr double kShift = 0.37;
    template <class Visit>
    bool visit_chain(std::int32_t i, std::int32_t j, std::int32_t k, bool& full, Visit& visit) const {
        std::uint32_t steps = 0;
        for (std::uint32_t id = table_[slot(i, j, k)]; id != kEnd; id = next_[id]) {
            if (visit(id)) return true;
            if (++steps > Limits::kChain) {
                full = true;
                return false;
            }
        }
        return false;
    }
    // x in [0, 1]; 1 is 0 again
    std::int32_t cube(double x) const { return static_cast<std::int32_t>(x * cubes_ + kShift); }
    std::uint32_t slot(std::int32_t i, std::int32_t j, std::int32_t k) const {
        const std::int32_t m = cubes_ - 1;
        const std::uint64_t h = (static_cast<std::uint64_t>(i & m) << 24 | static_cast<std::uint64_t>(j & m) << 12 |
                                 static_cast<std::uint64_t>(k & m)) *
                                0x9E3779B97F4A7C15ull;
        return static_cast<std::uint32_t>(h >> 40) & mask_;
    }
    std::vector<std::uint32_t>& table_;
    std::vector<std::uint32_t>& next_;
    std::uint32_t mask_;
    std::int32_t cubes_;
    double margin_;
};

inline bool same_modulo_one(const double* a, const double* b) {
    for (int k = 0; k < 3; ++k) {
        double d = a[k] - b[k];
        d -= geometry::round_even(d);
        if (!(std::fabs(d) < kSiteTolerance)) return false;
    }
    return true;
}

// The same to within rounding: wrapping the points first may change the answer.
inline bool nearly_same_modulo_one(const double* a, const double* b) {
    for (int k = 0; k < 3; ++k) {
        double d = a[k] - b[k];
        d -= geometry::round_even(d);
        if (!(std::fabs(d) < kSiteTolerance * (1 + 1e-6))) return false;
    }
    return true;
}

// What is read of a site's columns: a string is taken letter by letter.
struct Column {
    const Token* first;
    std::uint32_t stride;
    std::uint32_t size;
    const Token& operator[](std::uint32_t i) const { return first[std::size_t{i} * stride]; }
};

Column column_of(const Value& value, std::vector<Token>& letters) {
    if (value.is_list()) return {value.tokens(), value.stride(), value.size()};
    letters.clear();
    for (std::uint32_t i = 0; i < value.size(); ++i) letters.push_back({value[i].data(), 1, false});
    return {letters.data(), 1, value.size()};
}

inline void wrap(const double* x, double* wrapped) {
    for (int k = 0; k < 3; ++k) wrapped[k] = x[k] >= 0 && x[k] < 1 ? x[k] : x[k] - geometry::floor_of(x[k]);
}

// One third and two thirds, written with few digits, become exact.
inline bool may_be_third(double x) { return (std::fabs(x - 1.0 / 3.0) < 4e-5) | (std::fabs(x - 2.0 / 3.0) < 8e-5); }
inline double ideal_fraction(double x) {
    if (!may_be_third(x)) return x;
    for (const double third : {1.0 / 3.0, 2.0 / 3.0})
        if (std::fabs(x / third - 1.0) <= 1e-4) return third;
    return x;
}

// ------------------------------------------------------------------------------------------------- compositions

bool same_species(const Species& a, const Species& b) {
    if (a.element != b.element || a.has_oxidation != b.has_oxidation) return false;
    if (a.element == kNoElement && a.dummy != b.dummy) return false;
    return !a.has_oxidation || a.oxidation == b.oxidation;
}

class Builder {
  public:
    Builder(const Block& block, StructureScratch& scratch, Structure& structure)
        : block_(block), s_(scratch), out_(structure) {}

    Status build(bool magnetic, bool incommensurate);

  private:
    Status read_rows();
    Status merge_rows();
    void group_rows();
    Status make_images();
    void rows_as_sites();
    bool rows_are_apart() const;
    Status finish(bool have_lattice);
    std::uint32_t species_of(std::string_view name, const Symbol& symbol, bool typed);
    std::uint32_t species_id(const Species& species);
    bool equal_compositions(const StructureScratch::Row& a, const StructureScratch::Row& b) const;
    double amount_of(const StructureScratch::Row& row, const Species& species) const;
    bool is_water(const StructureScratch::Row& row) const;
    double total_amount(const StructureScratch::Row& row) const;
    void note_fields();

    const Block& block_;
    StructureScratch& s_;
    Structure& out_;
    OxidationStates oxidation_;
    std::uint32_t n_rows_ = 0;
    bool too_many_groups_ = false;
    bool odd_species_ = false;  // with an oxidation state that is not finite
    bool identity_ = false;     // one operation, x,y,z
    bool far_away_ = false;     // coordinates too large for the table's arithmetic
    bool merged_ = false;
    bool close_call_ = false;  // two rows are about as near as the tolerance
};

std::uint32_t Builder::species_id(const Species& species) {
    for (std::size_t i = s_.species.size(); i-- > 0;)
        if (same_species(s_.species[i], species)) return static_cast<std::uint32_t>(i);
    s_.species.push_back(species);
    return static_cast<std::uint32_t>(s_.species.size() - 1);
}

// Composition.__getitem__: an element stands for all species with its symbol (D and T are written H).
double Builder::amount_of(const StructureScratch::Row& row, const Species& species) const {
    double sum = 0;
    for (std::uint32_t i = 0; i < row.n_amounts; ++i) {
        const Amount& amount = s_.amounts[row.first_amount + i];
        const Species& other = s_.species[amount.species];
        if (species.has_oxidation || species.element == kNoElement) {
            if (same_species(other, species)) sum += amount.value;
        } else if (other.element != kNoElement && element(other.element).number == element(species.element).number) {
            sum += amount.value;
        }
    }
    return sum;
}

bool Builder::equal_compositions(const StructureScratch::Row& a, const StructureScratch::Row& b) const {
    if (a.n_amounts != b.n_amounts) return false;
    for (std::uint32_t i = 0; i < a.n_amounts; ++i) {
        const Amount& amount = s_.amounts[a.first_amount + i];
        if (a.n_amounts == 1 && amount.species == s_.amounts[b.first_amount].species) {
            if (!(std::fabs(amount.value - s_.amounts[b.first_amount].value) <= kAmountTolerance)) return false;
            continue;
        }
        if (!(std::fabs(amount.value - amount_of(b, s_.species[amount.species])) <= kAmountTolerance)) return false;
    }
    return true;
}

// {O, H} without oxidation states: O with implicit hydrogens, which are left out of the structure.
bool Builder::is_water(const StructureScratch::Row& row) const {
    if (row.n_amounts != 2) return false;
    bool oxygen = false;
    bool hydrogen = false;
    for (std::uint32_t i = 0; i < 2; ++i) {
        const Species& species = s_.species[s_.amounts[row.first_amount + i].species];
        if (species.element == kNoElement || species.has_oxidation || element(species.element).isotope) return false;
        oxygen |= element(species.element).number == 8;
        hydrogen |= element(species.element).number == 1;
    }
    return oxygen && hydrogen;
}

double Builder::total_amount(const StructureScratch::Row& row) const {
    double sum = 0;
    const bool water = is_water(row);
    for (std::uint32_t i = 0; i < row.n_amounts; ++i) {
        const Amount& amount = s_.amounts[row.first_amount + i];
        if (water && element(s_.species[amount.species].element).number != 8) continue;
        // values() of a Composition counts H again for D beside it
        sum += row.n_amounts == 1 ? amount.value : amount_of(row, s_.species[amount.species]);
    }
    return sum;
}

std::uint32_t Builder::species_of(std::string_view name, const Symbol& symbol, bool typed) {
    Species species;
    species.element = symbol.element;
    species.dummy = symbol.dummy;
    if (oxidation_.present()) {
        species.has_oxidation = true;
        char letters[3] = {0, 0, 0};
        std::string_view plain = symbol.dummy;
        if (symbol.kind == Symbol::kElement) {
            std::memcpy(letters, element(symbol.element).symbol, 3);
            plain = letters;
        }
        double state = 0;
        if (!oxidation_.find(plain, state)) state = 0;
        if (typed) oxidation_.find(name, state);
        species.oxidation = state;
        odd_species_ |= !std::isfinite(state);
    } else if (symbol.kind == Symbol::kDummy) {
        species.has_oxidation = true;  // a dummy always has one: 0
    }
    return species_id(species);
}

Status Builder::read_rows() {
    const Value& types = block_[Key::kSiteTypeSymbol];
    const Value& occupancy_values = block_[Key::kSiteOccupancy];
    const std::uint32_t n = block_[Key::kSiteLabel].size();
    if (std::uint64_t{n} * s_.operations.size() > Limits::kImages) return reject_text(Reason::kLimit);
    const Column names = column_of(types.present() ? types : block_[Key::kSiteLabel], s_.letters[0]);
    const Column occupancies = column_of(occupancy_values, s_.letters[1]);
    Column axes[3];
    bool have_axis[3];
    std::vector<double>& x = s_.x;
    if (x.size() < 3 * std::size_t{n}) x.resize(3 * std::size_t{n});
    for (int k = 0; k < 3; ++k) {
        const Value& value = block_[key_at(Key::kSiteFractX, k)];
        have_axis[k] = value.present();
        axes[k] = column_of(value, s_.letters[2 + k]);
        plain_decimals(axes[k].first, axes[k].stride, std::min(n, axes[k].size), x.data() + k, 3);
    }
    if (s_.rows.size() < n) s_.rows.resize(n);
    s_.amounts.resize(2 * std::size_t{n});
    Amount* amount = s_.amounts.data();
    for (StructureScratch::Name& known : s_.names) known.size = 0;

    StructureScratch::Name unnamed{};
    StructureScratch::Row* row = s_.rows.data();
    double* out = x.data();
    for (std::uint32_t i = 0; i < n; ++i) {
        if (i >= names.size) return reject_text(Reason::kSites);  // IndexError
        const std::string_view name = names[i].view();
        StructureScratch::Name* known = &unnamed;
        if (name.size() - 1 < 8) {
            const std::uint64_t word = left_word(name.data(), name.size());
            known = &s_.names[word * 0x9E3779B97F4A7C15ull >> 59];
            if (known->word != word) known->size = 0;
            known->word = word;
        } else {
            known->size = 0;
        }
        if (known->size != name.size() || known->size == 0) {
            Symbol symbol;
            if (!parse_symbol(name, symbol)) return reject_text(Reason::kSites);
            known->species = symbol.kind == Symbol::kNothing ? StructureScratch::kNoSpecies
                                                             : species_of(name, symbol, types.present());
            if (s_.species.size() > Limits::kCompositions) return reject_text(Reason::kLimit);
            known->hydrogens = static_cast<std::uint32_t>(implicit_hydrogens(name));
            known->size = static_cast<std::uint32_t>(name.size());
        }
        if (known->species == StructureScratch::kNoSpecies) continue;
        double occupancy = 1;
        if (occupancy_values.present()) {
            if (i >= occupancies.size) return reject_text(Reason::kSites);
            const std::string_view text = occupancies[i].view();
            if (!(text.size() == 1 && text[0] == '1') && !str2float(text, occupancy)) occupancy = 1;
        }
        if (!(occupancy > 0)) continue;
        for (int k = 0; k < 3; ++k) {
            if (i >= axes[k].size) return have_axis[k] ? reject_text(Reason::kSites) : skip_block(Reason::kSites);
            double value = x[3 * std::size_t{i} + k];
            if (std::isnan(value) && !str2float(axes[k][i].view(), value)) return skip_block(Reason::kNumber);
            out[k] = value;
        }
        out += 3;
        if (odd_species_ && !std::isfinite(s_.species[known->species].oxidation)) {
            // pymatgen cannot write such a species: ValueError for nan, OverflowError for inf
            if (std::isnan(s_.species[known->species].oxidation)) return skip_block(Reason::kUnsupported);
            return reject_text(Reason::kUnsupported);
        }
        row->first_amount = static_cast<std::uint32_t>(amount - s_.amounts.data());
        row->n_amounts = 1;
        *amount++ = {known->species, std::max(occupancy, 1e-8)};
        if (known->hydrogens != 0) {
            Species hydrogen;
            hydrogen.element = find_element('H', 0);
            *amount++ = {species_id(hydrogen), static_cast<double>(known->hydrogens)};
            row->n_amounts = 2;
        }
        ++row;
    }
    s_.amounts.resize(static_cast<std::size_t>(amount - s_.amounts.data()));
    n_rows_ = static_cast<std::uint32_t>(row - s_.rows.data());
    out_.raw.assign(x.data(), out);
    bool thirds = false;
    double low = out_.raw.empty() ? 0 : x[0];
    double high = low;
    bool numbers = true;
    for (std::size_t i = 0; i < out_.raw.size(); ++i) {
        const double value = x[i];
        thirds |= may_be_third(value);
        numbers &= value == value;
        low = value < low ? value : low;
        high = value > high ? value : high;
    }
    out_.raw_low = numbers ? low : std::numeric_limits<double>::quiet_NaN();
    out_.raw_high = high;
    far_away_ = !(numbers && low > -1e6 && high < 1e6);
    if (thirds)
        for (std::size_t i = 0; i < out_.raw.size(); ++i) x[i] = ideal_fraction(x[i]);
    return ok();
}

// Rows that an operation carries onto an earlier one are added to it.
Status Builder::merge_rows() {
    PointTable points(s_.table, s_.next, n_rows_);
    std::vector<StructureScratch::Row>& rows = s_.rows;
    std::uint32_t kept = 0;
    for (std::uint32_t r = 0; r < n_rows_; ++r) {
        const StructureScratch::Row row = rows[r];
        const double x[3] = {s_.x[3 * std::size_t{r}], s_.x[3 * std::size_t{r} + 1], s_.x[3 * std::size_t{r} + 2]};
        const auto at = [&](std::uint32_t id) { return s_.x.data() + 3 * std::size_t{id}; };
        // Few rows are compared one by one, and so are huge and non-finite coordinates.
        const bool all = kept <= kFewPoints || far_away_;
        if (far_away_ && kept > 4096) return reject_text(Reason::kLimit);
        bool full = false;
        // get_matching_coord: the first operation that carries this row onto an earlier one
        std::uint32_t match = kEnd;
        for (std::size_t o = 0; o < s_.operations.size() && kept > 0; ++o) {
            double image[3];
            if (identity_) {
                std::memcpy(image, x, sizeof image);
            } else {
                for (int k = 0; k < 3; ++k) image[k] = s_.operations[o].component(k, x);
            }
            const auto closer = [&](std::uint32_t id) {
                if (nearly_same_modulo_one(at(id), image)) {
                    close_call_ = true;
                    if (same_modulo_one(at(id), image)) match = std::min(match, id);
                }
                return false;
            };
            if (all) {
                for (std::uint32_t id = 0; id < kept; ++id) closer(id);
            } else {
                double wrapped[3];
                wrap(image, wrapped);  // not finite: no match
                if (std::isfinite(wrapped[0] + wrapped[1] + wrapped[2])) points.search(wrapped, full, closer);
                if (full) return reject_text(Reason::kLimit);
            }
            if (match != kEnd) break;
        }
        if (match != kEnd) {  // Composition.__add__, the earlier species first
            merged_ = true;
            StructureScratch::Row& earlier = rows[match];
            const auto start = static_cast<std::uint32_t>(s_.amounts.size());
            for (std::uint32_t a = 0; a < earlier.n_amounts; ++a) {
                const std::uint32_t species = s_.amounts[earlier.first_amount + a].species;
                const double value = amount_of(earlier, s_.species[species]);
                s_.amounts.push_back({species, value});
            }
            for (std::uint32_t a = 0; a < row.n_amounts; ++a) {
                const Amount added = s_.amounts[row.first_amount + a];
                bool known = false;
                for (std::size_t b = start; b < s_.amounts.size() && !known; ++b) {
                    if (s_.amounts[b].species != added.species) continue;
                    s_.amounts[b].value += added.value;
                    known = true;
                }
                if (!known) s_.amounts.push_back(added);
            }
            earlier.first_amount = start;
            earlier.n_amounts = static_cast<std::uint32_t>(s_.amounts.size() - start);
            if (s_.amounts.size() > 64u * Limits::kSites) return reject_text(Reason::kLimit);
            continue;
        }
        // Without the identity among the operations a row may repeat an earlier one's coordinates unnoticed: the same
        // key of pymatgen's dict, so the later composition wins.
        double wrapped[3];
        wrap(x, wrapped);
        if (!identity_) {
            std::uint32_t same = kEnd;
            const auto exact = [&](std::uint32_t id) {
                const double* y = at(id);
                if (y[0] == x[0] && y[1] == x[1] && y[2] == x[2]) same = id;
                return same != kEnd;
            };
            if (all) {
                for (std::uint32_t id = 0; id < kept && same == kEnd; ++id) exact(id);
            } else {
                points.search(wrapped, full, exact);
                if (full) return reject_text(Reason::kLimit);
            }
            if (same != kEnd) {
                rows[same].first_amount = row.first_amount;
                rows[same].n_amounts = row.n_amounts;
                continue;
            }
        }
        std::memcpy(s_.x.data() + 3 * std::size_t{kept}, x, sizeof x);
        rows[kept++] = row;
        if (kept > Limits::kSites) return reject_text(Reason::kLimit);
        if (!far_away_) points.insert(wrapped);
    }
    n_rows_ = kept;
    return ok();
}

// Numbers the different compositions; a row is in the first group that it equals.
void Builder::group_rows() {
    s_.groups.clear();
    s_.species_rows.assign(s_.species.size(), kEnd);
    for (std::uint32_t r = 0; r < n_rows_; ++r) {
        StructureScratch::Row& row = s_.rows[r];
        const Amount amount = s_.amounts[row.first_amount];
        const bool single = row.n_amounts == 1;
        if (single) {  // the same species and amount as in a row before
            const std::uint32_t before = s_.species_rows[amount.species];
            if (before != kEnd && s_.amounts[s_.rows[before].first_amount].value == amount.value) {
                row.group = s_.rows[before].group;
                continue;
            }
            s_.species_rows[amount.species] = r;
        }
        row.group = kEnd;
        for (std::uint32_t g = 0; g < s_.groups.size() && row.group == kEnd; ++g)
            if (equal_compositions(s_.rows[s_.groups[g]], row)) row.group = g;
        if (row.group == kEnd) {
            too_many_groups_ |= s_.groups.size() >= Limits::kCompositions;
            if (too_many_groups_) return;
            row.group = static_cast<std::uint32_t>(s_.groups.size());
            s_.groups.push_back(r);
        }
    }
}

void Builder::rows_as_sites() {
    out_.frac.resize(3 * std::size_t{n_rows_});
    double* frac = out_.frac.data();
    for (std::size_t r = 0; r < n_rows_; ++r) wrap(&s_.x[3 * r], frac + 3 * r);
}

// No two sites of out_ are the same to pymatgen: such a pair is nearer than the tolerance along all three axes. (1 %
// covers rounding. False says nothing; nan is false.)
bool Builder::rows_are_apart() const {
    double diagonal = 0;
    for (int k = 0; k < 3; ++k) {
        const double* axis = out_.lattice.rows + 3 * k;
        diagonal += std::sqrt(axis[0] * axis[0] + axis[1] * axis[1] + axis[2] * axis[2]);
    }
    return out_.min_distance > 1.01 * kSiteTolerance * diagonal;
}

// _unique_coords for every group of rows with equal compositions: images that are not yet there, wrapped into the
// cell.
Status Builder::make_images() {
    std::vector<double>& frac = out_.frac;
    std::vector<std::uint32_t>& group = s_.site_group;
    group.clear();
    frac.clear();
    PointTable points(s_.table, s_.next, std::size_t{n_rows_} * s_.operations.size());
    for (std::uint32_t r = 0; r < n_rows_; ++r) {
        const StructureScratch::Row& row = s_.rows[r];
        for (const AffineOperation& operation : s_.operations) {
            double image[3];
            double wrapped[3];
            for (int k = 0; k < 3; ++k) {
                image[k] = operation.component(k, &s_.x[3 * std::size_t{r}]);
                if (std::isnan(image[k])) return skip_block(Reason::kNumber);   // floor(nan): ValueError
                if (std::isinf(image[k])) return reject_text(Reason::kNumber);  // floor(inf): OverflowError
            }
            wrap(image, wrapped);
            bool full = false;
            bool known = false;
            const auto same = [&](std::uint32_t id) {
                return group[id] == row.group && same_modulo_one(&frac[3 * std::size_t{id}], wrapped);
            };
            if (group.size() <= kFewPoints) {
                for (std::uint32_t id = 0; id < group.size() && !known; ++id) known = same(id);
            } else {
                known = points.search(wrapped, full, same);
            }
            if (full) return reject_text(Reason::kLimit);
            if (known) continue;
            points.insert(wrapped);
            frac.insert(frac.end(), wrapped, wrapped + 3);
            group.push_back(row.group);
            if (group.size() > Limits::kSites) return reject_text(Reason::kLimit);
        }
    }
    return ok();
}

Status Builder::finish(bool have_lattice) {
    for (std::uint32_t g = 0; g < s_.groups.size(); ++g)
        if (total_amount(s_.rows[s_.groups[g]]) > 1.0) return skip_block(Reason::kOccupancy);
    if (n_rows_ == 0) return skip_block(Reason::kSites);
    if (!have_lattice) return skip_block(Reason::kCell);

    // Whole-cell counts, one site after the other as pymatgen adds them up.
    std::vector<double>& sums = s_.sums;
    sums.assign(s_.species.size(), 0.0);
    std::vector<std::uint32_t>& sites_of_group = s_.next;
    sites_of_group.assign(s_.groups.size(), 0);
    for (std::uint32_t group : s_.site_group) ++sites_of_group[group];
    std::vector<std::uint32_t>& number_of_group = s_.table;
    number_of_group.assign(s_.groups.size(), 0);
    for (std::uint32_t g = 0; g < s_.groups.size(); ++g) {
        const StructureScratch::Row& row = s_.rows[s_.groups[g]];
        const bool water = is_water(row);
        double most = -1;
        for (std::uint32_t a = 0; a < row.n_amounts; ++a) {
            const Amount& amount = s_.amounts[row.first_amount + a];
            const Species& species = s_.species[amount.species];
            if (water && element(species.element).number != 8) continue;
            sums[amount.species] += amount.value * sites_of_group[g];
            if (amount.value > most) {
                most = amount.value;
                number_of_group[g] = species.element == kNoElement ? 0 : element(species.element).number;
            }
        }
    }
    out_.numbers.resize(s_.site_group.size());
    for (std::size_t i = 0; i < s_.site_group.size(); ++i)
        out_.numbers[i] = static_cast<std::int32_t>(number_of_group[s_.site_group[i]]);
    double mass = 0;
    for (std::size_t i = 0; i < s_.species.size(); ++i) {
        if (sums[i] == 0) continue;
        const Species& species = s_.species[i];
        std::string_view symbol = species.dummy;
        int number = 0;
        if (species.element == kNoElement) {
            mass = std::numeric_limits<double>::quiet_NaN();
        } else {
            const Element& e = element(species.element);
            mass += e.mass * sums[i];
            symbol = e.isotope ? std::string_view("H") : std::string_view(e.symbol);
            number = e.number;
        }
        bool known = false;
        for (Count& count : out_.counts) {
            if (count.symbol != symbol) continue;
            count.amount += sums[i];
            known = true;
        }
        if (!known) out_.counts.push_back({symbol, number, sums[i]});
    }
    out_.mass = mass;
    note_fields();
    return ok();
}

void Builder::note_fields() {
    Fields& fields = out_.fields;
    fields.lattice = true;
    for (int i = 0; i < 6; ++i) fields.lattice &= block_[key_at(Key::kCellLengthA, i)].truthy();
    for (Key key :
         {Key::kSymops0, Key::kSymops2, Key::kName0, Key::kName6, Key::kName4, Key::kNumber0, Key::kNumber2})
        fields.space_group |= block_[key].truthy();
    const Value& labels = block_[Key::kSiteLabel];
    fields.site_loop = labels.is_list();
    for (Key key : {Key::kSiteFractX, Key::kSiteFractY, Key::kSiteFractZ}) fields.site_loop &= block_[key].is_list();
    if (!labels.is_list()) return;
    // Duplicate labels, by an open hash table of row numbers. A label up to eight characters is its own word, a
    // longer one has a hash.
    const std::uint32_t n = labels.size();
    std::size_t size = 64;
    while (size < 2 * std::size_t{n}) size *= 2;
    std::vector<std::uint32_t>& table = s_.table;
    table.assign(size, kEnd);
    if (s_.words.size() < n) s_.words.resize(n);
    std::uint64_t* words = s_.words.data();
    for (std::uint32_t i = 0; i < n; ++i) {
        const std::string_view label = labels[i];
        std::uint64_t word = label.size();
        if (label.size() - 1 < 8) {
            word = left_word(label.data(), label.size());
        } else {
            for (char c : label) word = (word ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
        }
        words[i] = word;
        std::uint64_t h = word * 0x9E3779B97F4A7C15ull;
        h ^= h >> 32;
        std::size_t at = h & (size - 1);
        for (; table[at] != kEnd; at = (at + 1) & (size - 1)) {
            if (words[table[at]] == word && labels[table[at]] == label) {
                fields.duplicate_labels = true;
                return;
            }
        }
        table[at] = i;
    }
}

Status Builder::build(bool magnetic, bool incommensurate) {
    bool have_lattice = false;
    Status status = read_lattice(block_, out_.lattice, have_lattice);
    if (!status.ok()) return status;
    if (have_lattice) {
        double spacings[3];
        if (!geometry::plane_spacings(out_.lattice, spacings)) return skip_block(Reason::kCell);
        for (double spacing : spacings)
            if (spacing < kThinnest) return skip_block(Reason::kCell);
    }
    if (magnetic && incommensurate) return reject_text(Reason::kMagnetic);
    if (magnetic && !have_lattice) return skip_block(Reason::kCell);
    status = magnetic ? magnetic_operations(block_, s_.components, s_.operations)
                      : symmetry_operations(block_, s_.components, s_.operations);
    if (!status.ok()) return status;
    if (magnetic) {
        // _parse_magmoms: the values do not matter here, a column that is too short does.
        const Value& moments = block_[Key::kMomentLabel];
        bool readable = true;
        for (std::uint32_t i = 0; i < moments.size() && readable; ++i) {
            for (int k = 0; k < 3 && readable; ++k) {
                const Value& column = block_[key_at(Key::kMomentX, k)];
                double value = 0;
                readable = column.present();
                if (readable && i >= column.size()) return reject_text(Reason::kMagnetic);
                readable = readable && str2float(column[i], value);
            }
        }
    }
    status = oxidation_.read(block_);
    if (!status.ok()) return status;
    if (!block_[Key::kSiteLabel].present()) return skip_block(Reason::kSites);
    identity_ = s_.operations.size() == 1 && s_.operations[0].is_identity();
    status = read_rows();
    if (!status.ok()) return status;
    bool sites = false;  // out_.frac and min_distance are made
    if (identity_ && have_lattice && !far_away_ && n_rows_ <= Limits::kSites) {
        rows_as_sites();
        out_.min_distance = geometry::min_distance(out_.lattice, out_.frac.data(), n_rows_, s_.distance);
        sites = rows_are_apart();
    }
    if (!sites) {  // else there is nothing to merge
        status = merge_rows();
        if (!status.ok()) return status;
    }
    if (magnetic && merged_) return reject_text(Reason::kMagnetic);  // disordered magnetic structures
    group_rows();
    if (too_many_groups_) return reject_text(Reason::kLimit);
    if (sites || (identity_ && !close_call_ && !far_away_)) {  // the rows are the sites
        if (!sites) rows_as_sites();
        s_.site_group.resize(n_rows_);
        for (std::uint32_t r = 0; r < n_rows_; ++r) s_.site_group[r] = s_.rows[r].group;
    } else {
        sites = false;
        status = make_images();
        if (!status.ok()) return status;
    }
    status = finish(have_lattice);
    if (status.ok() && !sites)
        out_.min_distance = geometry::min_distance(out_.lattice, out_.frac.data(), out_.numbers.size(), s_.distance);
    return status;
}

}  // namespace

void Structure::clear() {
    frac.clear();
    numbers.clear();
    counts.clear();
    raw.clear();
    mass = min_distance = raw_low = raw_high = 0;
    fields = Fields();
}

Status build_structure(const Block& block, bool magnetic, bool incommensurate, StructureScratch& scratch,
                       Structure& structure) {
    structure.clear();
    scratch.species.clear();
    scratch.amounts.clear();
    return Builder(block, scratch, structure).build(magnetic, incommensurate);
}

}  // namespace catmllm::cif
