#include "species.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

namespace catmllm::cif {
namespace {

constexpr double kAmountTolerance = 1e-8;
constexpr int kOxygen = 8;
constexpr std::uint32_t kMostSpecies =
    64;  // of one composition that are looked at for its place in the order

bool same_species(const Species& a, const Species& b) {
    if (a.element != b.element || a.has_oxidation != b.has_oxidation) return false;
    if (a.element == kNoElement && a.dummy != b.dummy) return false;
    return !a.has_oxidation || a.oxidation == b.oxidation;
}

// Of H, D and T each has the amounts of all.
constexpr std::uint32_t kHydrogens = 3;
bool is_plain_hydrogen(const Species& s) {
    return s.element != kNoElement && !s.has_oxidation && element(s.element).number == 1;
}

bool nearly(double a, double b) { return std::fabs(a - b) <= kAmountTolerance; }  // nan is not

}  // namespace

void Compositions::clear() {
    species.clear();
    amounts.clear();
}

std::uint32_t Compositions::id_of(const Species& wanted) {
    for (std::size_t i = species.size(); i-- > 0;)
        if (same_species(species[i], wanted)) return static_cast<std::uint32_t>(i);
    species.push_back(wanted);
    return static_cast<std::uint32_t>(species.size() - 1);
}

double Compositions::amount_of(const Composition& composition, const Species& wanted) const {
    double sum = 0;
    for (std::uint32_t i = 0; i < composition.size; ++i) {
        const Amount& amount = amounts[composition.first + i];
        const Species& other = species[amount.species];
        if (wanted.has_oxidation || wanted.element == kNoElement) {
            if (same_species(other, wanted)) sum += amount.value;
        } else if (other.element != kNoElement &&
                   element(other.element).number == element(wanted.element).number) {
            sum += amount.value;
        }
    }
    return sum;
}

bool Compositions::equal(const Composition& a, const Composition& b) const {
    if (a.size != b.size) return false;
    for (std::uint32_t i = 0; i < a.size; ++i) {
        const Amount& amount = amounts[a.first + i];
        const Amount& other = amounts[b.first];
        const bool alone =
            a.size == 1 && amount.species == other.species;  // the usual case, without a search
        if (!nearly(amount.value, alone ? other.value : amount_of(b, species[amount.species]))) return false;
    }
    return true;
}

bool Compositions::less(const Composition& a, const Composition& b) const {
    std::uint32_t ids[2 * kMostSpecies];
    std::uint32_t n = 0;
    for (const Composition& c : {a, b})
        for (std::uint32_t i = 0; i < c.size && n < 2 * kMostSpecies; ++i)
            ids[n++] = amounts[c.first + i].species;
    // A dummy's electronegativity is 0 to pymatgen. Beside an element that has none (nan) it comes last; with
    // other elements there is no order of all three.
    const bool dummies_last = std::all_of(ids, ids + n, [&](std::uint32_t i) {
        const Species& s = species[i];
        return s.element == kNoElement || element(s.element).electronegativity == kNoElectronegativity;
    });
    const double of_dummies = dummies_last ? 2 * kNoElectronegativity : 0;
    std::sort(ids, ids + n, [&](std::uint32_t i, std::uint32_t j) {  // sorted(set(a.elements + b.elements))
        const Species& s = species[i];
        const Species& t = species[j];
        const double x = s.element == kNoElement ? of_dummies : element(s.element).electronegativity;
        const double y = t.element == kNoElement ? of_dummies : element(t.element).electronegativity;
        if (x != y) return x < y;
        const std::string_view p =
            s.element == kNoElement ? s.dummy : std::string_view(element(s.element).symbol);
        const std::string_view q =
            t.element == kNoElement ? t.dummy : std::string_view(element(t.element).symbol);
        if (p != q) return p < q;
        return s.oxidation < t.oxidation;
    });
    for (std::uint32_t i = 0; i < n; ++i) {
        const double x = amount_of(a, species[ids[i]]);
        const double y = amount_of(b, species[ids[i]]);
        if (y - x >= kAmountTolerance) return true;
        if (x - y >= kAmountTolerance) return false;
    }
    return false;
}

void Compositions::add(Composition& to, const Composition& added) {
    // Every amount is read as amount_of() has it, which is the amount itself but for these.
    std::pair<std::uint32_t, double> hydrogens[kHydrogens];  // where they stand, and their new amounts
    std::uint32_t n = 0;
    for (std::uint32_t i = to.first; i < to.first + to.size && n < kHydrogens; ++i) {
        const Species& s = species[amounts[i].species];
        if (is_plain_hydrogen(s)) hydrogens[n++] = {i, amount_of(to, s)};
    }
    for (std::uint32_t i = 0; i < n; ++i) amounts[hydrogens[i].first].value = hydrogens[i].second;
    for (std::uint32_t i = 0; i < added.size; ++i) {
        const Amount amount = amounts[added.first + i];
        const auto begin = amounts.begin() + to.first;
        const auto known = std::find_if(begin, begin + to.size,
                                        [&](const Amount& a) { return a.species == amount.species; });
        if (known != begin + to.size) {
            known->value += amount.value;
            continue;
        }
        if ((to.size & (to.size - 1)) == 0) {  // full: the room of a composition is a power of two
            const auto room = static_cast<std::uint32_t>(amounts.size());
            amounts.resize(room + 2 * std::size_t{to.size});
            std::copy_n(amounts.begin() + to.first, to.size, amounts.begin() + room);
            to.first = room;
        }
        amounts[to.first + to.size++] = amount;
    }
}

bool Compositions::is_water(const Composition& composition) const {
    if (composition.size != 2) return false;
    bool oxygen = false;
    bool hydrogen = false;
    for (std::uint32_t i = 0; i < 2; ++i) {
        const Species& s = species[amounts[composition.first + i].species];
        if (s.element == kNoElement || s.has_oxidation || element(s.element).isotope) return false;
        oxygen |= element(s.element).number == kOxygen;
        hydrogen |= element(s.element).number == 1;
    }
    return oxygen && hydrogen;
}

double Compositions::total(const Composition& composition) const {
    double sum = 0;
    const bool water = is_water(composition);
    for (std::uint32_t i = 0; i < composition.size; ++i) {
        const Amount& amount = amounts[composition.first + i];
        if (water && element(species[amount.species].element).number != kOxygen) continue;
        // values() of a Composition counts H again for D beside it
        sum += composition.size == 1 ? amount.value : amount_of(composition, species[amount.species]);
    }
    return sum;
}

}  // namespace catmllm::cif
