// The rows of the site loop: names to species, occupancies, coordinates.
#include "site_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>

#include "../geometry/lanes.h"
#include "characters.h"
#include "decimals.h"
#include "number.h"
#include "steps.h"

namespace catmllm::cif {
namespace {

constexpr double kLeastOccupancy = 1e-8;
constexpr double kFarthest =
    1e6;  // coordinates up to here are points of the unit cube to within the tolerance

// A column of the site loop: a string is taken letter by letter.
struct Column {
    const Token* first;
    std::uint32_t stride;
    std::uint32_t size;
    bool present;
    const Token& operator[](std::uint32_t i) const { return first[std::size_t{i} * stride]; }
};

Column column_of(const Value& value, std::vector<Token>& letters) {
    if (value.is_list()) return {value.tokens(), value.stride(), value.size(), true};
    letters.clear();
    for (std::uint32_t i = 0; i < value.size(); ++i) letters.push_back({value[i].data(), 1, false});
    return {letters.data(), 1, value.size(), value.present()};
}

Species species_of(std::string_view name, const Symbol& symbol, bool typed,
                   const OxidationStates& oxidation) {
    Species species;
    species.element = symbol.element;
    species.dummy = symbol.dummy;
    if (oxidation.present()) {
        species.has_oxidation = true;
        char letters[3] = {0, 0, 0};
        std::string_view plain = symbol.dummy;
        if (symbol.kind == Symbol::kElement) {
            std::memcpy(letters, element(symbol.element).symbol, 3);
            plain = letters;
        }
        oxidation.find(plain, species.oxidation);
        if (typed) oxidation.find(name, species.oxidation);
    } else if (symbol.kind == Symbol::kDummy) {
        species.has_oxidation = true;  // a dummy always has one: 0
    }
    return species;
}

// What a name stands for: `known`, where it is the same name, or as read from its letters.
class Names {
  public:
    Names(bool typed, const OxidationStates& oxidation, SiteRowScratch& scratch, Compositions& compositions)
        : typed_(typed), oxidation_(oxidation), scratch_(scratch), compositions_(compositions) {
        for (KnownName& known : scratch_.names) known.size = 0;
    }

    Status look_up(std::string_view name, const KnownName*& found) {
        KnownName* known = &unknown_;
        if (name.size() - 1 < 8) {
            const std::uint64_t word = left_word(name.data(), name.size());
            known = &scratch_.names[word * 0x9E3779B97F4A7C15ull >> 59];
            if (known->word != word) known->size = 0;
            known->word = word;
        } else {
            known->size = 0;
        }
        found = known;
        return known->size != name.size() || known->size == 0 ? read(name, *known) : ok();
    }

  private:
    static_assert(SiteRowScratch::kNames == 1 << (64 - 59));

    Status read(std::string_view name, KnownName& known) {
        Symbol symbol;
        if (!parse_symbol(name, symbol)) return reject_text(Reason::kSites);
        known.species = KnownName::kNoSpecies;
        known.finite = true;
        if (symbol.kind != Symbol::kNothing) {
            const Species species = species_of(name, symbol, typed_, oxidation_);
            known.species = compositions_.id_of(species);
            known.finite = std::isfinite(species.oxidation);
        }
        if (compositions_.species.size() > Limits::kCompositions) return reject_text(Reason::kLimit);
        known.hydrogens = static_cast<std::uint32_t>(implicit_hydrogens(name));
        known.size = static_cast<std::uint32_t>(name.size());
        return ok();
    }

    bool typed_;
    const OxidationStates& oxidation_;
    SiteRowScratch& scratch_;
    Compositions& compositions_;
    KnownName unknown_{};
};

// pymatgen cannot write a species with such an oxidation state: ValueError for nan, OverflowError for inf.
Status refuse_oxidation(double state) {
    return std::isnan(state) ? skip_block(Reason::kUnsupported) : reject_text(Reason::kUnsupported);
}

// One third and two thirds, written with few digits, become exact.
constexpr double kNearThird = 4e-5;
bool may_be_third(double x) {
    return (std::fabs(x - 1.0 / 3.0) < kNearThird) | (std::fabs(x - 2.0 / 3.0) < 2 * kNearThird);
}
double ideal_fraction(double x) {
    if (!may_be_third(x)) return x;
    for (const double third : {1.0 / 3.0, 2.0 / 3.0})
        if (std::fabs(x / third - 1.0) <= 1e-4) return third;
    return x;
}

struct Range {
    double low, high;
    bool numbers;  // all of them
    bool thirds;   // some may be
};

// Of n numbers with room for a whole vector. (Each lane is chosen between two values; masks kept as such are
// slow.)
CATMLLM_CLONES Range range_of(const double* x, std::size_t n) {
    using geometry::kLanes;
    using geometry::Lanes;
    Lanes low = Lanes{} + x[0];
    Lanes high = low;
    Lanes nan = {};
    Lanes from_third = Lanes{} + 1.0;
    for (std::size_t i = 0; i < n; i += kLanes) {
        Lanes v = geometry::load(x + i);
        if (n - i < kLanes) v = geometry::first_lanes(v, static_cast<std::int64_t>(n - i), x[0]);
        Lanes one = v - 1.0 / 3.0;
        Lanes two = v - 2.0 / 3.0;
        one = 2.0 * (one > -one ? one : -one);
        two = two > -two ? two : -two;
        from_third = one < from_third ? one : from_third;
        from_third = two < from_third ? two : from_third;
        nan = v == v ? nan : v;
        low = v < low ? v : low;
        high = v > high ? v : high;
    }
    Range range{low[0], high[0], true, false};
    for (int l = 0; l < kLanes; ++l) {
        range.low = low[l] < range.low ? low[l] : range.low;
        range.high = high[l] > range.high ? high[l] : range.high;
        range.numbers &= nan[l] == nan[l];
        range.thirds |= from_third[l] < 2 * kNearThird;
    }
    return range;
}

// Keeps the coordinates as they were written, with their range, and makes thirds exact.
void take_coordinates(SiteRows& rows, Structure& structure) {
    double* x = rows.x.data();
    const std::size_t n = 3 * std::size_t{rows.size};
    structure.raw.assign(x, x + n);
    const Range range = n == 0 ? Range{0, 0, true, false} : range_of(x, n);
    structure.raw_low = range.numbers ? range.low : std::numeric_limits<double>::quiet_NaN();
    structure.raw_high = range.high;
    rows.inside = range.numbers && range.low >= 0 && range.high < 1;
    rows.far_away = !(range.numbers && range.low > -kFarthest && range.high < kFarthest);
    if (range.thirds)
        for (std::size_t i = 0; i < n; ++i) x[i] = ideal_fraction(x[i]);
}

}  // namespace

Status read_site_rows(const Block& block, const OxidationStates& oxidation, std::size_t n_operations,
                      SiteRowScratch& scratch, SiteRows& rows, Compositions& compositions,
                      Structure& structure) {
    const Value& labels = block[Key::kSiteLabel];
    const Value& types = block[Key::kSiteTypeSymbol];
    const std::uint32_t n = labels.size();
    if (std::uint64_t{n} * n_operations > Limits::kImages) return reject_text(Reason::kLimit);
    if (rows.rows.size() < n) rows.rows.resize(n);
    if (rows.x.size() < 3 * std::size_t{n} + geometry::kLanes)
        rows.x.resize(3 * std::size_t{n} + geometry::kLanes);
    compositions.amounts.resize(2 * std::size_t{n});  // a species and its hydrogens

    const Column names = column_of(types.present() ? types : labels, scratch.name_letters);
    const Column occupancies = column_of(block[Key::kSiteOccupancy], scratch.occupancy_letters);
    Column axes[3];
    double* x = rows.x.data();
    for (int k = 0; k < 3; ++k) {
        axes[k] = column_of(block[key_at(Key::kSiteFractX, k)], scratch.axis_letters[k]);
        plain_decimals(axes[k].first, axes[k].stride, std::min(n, axes[k].size), x + k, 3);
    }

    Names known_names(types.present(), oxidation, scratch, compositions);
    SiteRow* row = rows.rows.data();
    Amount* amount = compositions.amounts.data();
    double* out = x;  // never ahead of row i
    for (std::uint32_t i = 0; i < n; ++i) {
        if (i >= names.size) return reject_text(Reason::kSites);  // IndexError
        const KnownName* name;
        if (const Status status = known_names.look_up(names[i].view(), name); !status.ok()) return status;
        if (name->species == KnownName::kNoSpecies) continue;
        double occupancy = 1;
        if (occupancies.present) {
            if (i >= occupancies.size) return reject_text(Reason::kSites);
            const std::string_view text = occupancies[i].view();
            if (!(text.size() == 1 && text[0] == '1') && !str2float(text, occupancy)) occupancy = 1;
        }
        if (!(occupancy > 0)) continue;
        for (int k = 0; k < 3; ++k) {
            if (i >= axes[k].size)
                return axes[k].present ? reject_text(Reason::kSites) : skip_block(Reason::kSites);
            double value = x[3 * std::size_t{i} + k];
            if (std::isnan(value) && !str2float(axes[k][i].view(), value)) return skip_block(Reason::kNumber);
            out[k] = value;
        }
        out += 3;
        if (!name->finite) return refuse_oxidation(compositions.species[name->species].oxidation);
        row->composition = {static_cast<std::uint32_t>(amount - compositions.amounts.data()), 1};
        *amount++ = {name->species, std::max(occupancy, kLeastOccupancy)};
        if (name->hydrogens != 0) {
            Species hydrogen;
            hydrogen.element = find_element('H', 0);
            *amount++ = {compositions.id_of(hydrogen), static_cast<double>(name->hydrogens)};
            row->composition.size = 2;
        }
        ++row;
    }
    compositions.amounts.resize(static_cast<std::size_t>(amount - compositions.amounts.data()));
    rows.size = static_cast<std::uint32_t>(row - rows.rows.data());
    take_coordinates(rows, structure);
    return ok();
}

}  // namespace catmllm::cif
