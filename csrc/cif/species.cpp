#include "species.h"

#include <cmath>
#include <cstddef>

namespace catmllm::cif {
namespace {

constexpr double kAmountTolerance = 1e-8;
constexpr int kOxygen = 8;

bool same_species(const Species& a, const Species& b) {
    if (a.element != b.element || a.has_oxidation != b.has_oxidation) return false;
    if (a.element == kNoElement && a.dummy != b.dummy) return false;
    return !a.has_oxidation || a.oxidation == b.oxidation;
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
        } else if (other.element != kNoElement && element(other.element).number == element(wanted.element).number) {
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
        const bool alone = a.size == 1 && amount.species == other.species;  // the usual case, without a search
        if (!nearly(amount.value, alone ? other.value : amount_of(b, species[amount.species]))) return false;
    }
    return true;
}

Composition Compositions::sum(const Composition& a, const Composition& b) {
    const auto start = static_cast<std::uint32_t>(amounts.size());
    for (std::uint32_t i = 0; i < a.size; ++i) {
        const std::uint32_t id = amounts[a.first + i].species;
        const double value = amount_of(a, species[id]);
        amounts.push_back({id, value});
    }
    for (std::uint32_t i = 0; i < b.size; ++i) {
        const Amount added = amounts[b.first + i];
        bool known = false;
        for (std::size_t k = start; k < amounts.size() && !known; ++k) {
            if (amounts[k].species != added.species) continue;
            amounts[k].value += added.value;
            known = true;
        }
        if (!known) amounts.push_back(added);
    }
    return {start, static_cast<std::uint32_t>(amounts.size() - start)};
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
