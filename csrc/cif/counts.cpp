// The atoms of the whole cell: atomic numbers site by site, amounts element by element, the mass.
#include <algorithm>
#include <limits>

#include "steps.h"

namespace catmllm::cif {
namespace {

constexpr std::size_t kFewGroups = 6;  // up to here a pass for each is quicker than one that counts all

void add_count(std::string_view symbol, int number, double amount, std::vector<Count>& counts) {
    for (Count& count : counts) {
        if (count.symbol != symbol) continue;
        count.amount += amount;
        return;
    }
    counts.push_back({symbol, number, amount});
}

}  // namespace

void count_atoms(const Compositions& compositions, const SiteRows& rows, const Groups& groups,
                 CountScratch& scratch, Structure& structure) {
    const std::size_t n_groups = groups.first_row.size();
    std::vector<std::uint32_t>& sites_of_group = scratch.sites_of_group;
    sites_of_group.assign(n_groups, 0);
    if (n_groups <= kFewGroups) {
        for (std::uint32_t g = 0; g < n_groups; ++g)
            sites_of_group[g] =
                static_cast<std::uint32_t>(std::count(groups.of_site.begin(), groups.of_site.end(), g));
    } else {
        for (std::uint32_t group : groups.of_site) ++sites_of_group[group];
    }

    // Group after group, as pymatgen adds sites up.
    std::vector<double>& atoms = scratch.atoms_of_species;
    atoms.assign(compositions.species.size(), 0.0);
    std::vector<std::int32_t>& number_of_group = scratch.number_of_group;
    number_of_group.assign(n_groups, 0);
    for (std::size_t g = 0; g < n_groups; ++g) {
        const Composition composition = rows.rows[groups.first_row[g]].composition;
        const bool water = compositions.is_water(composition);
        double most = -1;
        for (std::uint32_t a = 0; a < composition.size; ++a) {
            const Amount& amount = compositions.amounts[composition.first + a];
            const Species& species = compositions.species[amount.species];
            const int number = species.element == kNoElement ? 0 : element(species.element).number;
            if (water && number != 8) continue;
            atoms[amount.species] += amount.value * sites_of_group[g];
            if (!(amount.value > most)) continue;
            most = amount.value;
            number_of_group[g] = number;
        }
    }
    structure.numbers.resize(groups.of_site.size());
    for (std::size_t i = 0; i < groups.of_site.size(); ++i)
        structure.numbers[i] = number_of_group[groups.of_site[i]];

    double mass = 0;
    for (std::size_t s = 0; s < atoms.size(); ++s) {
        if (atoms[s] == 0) continue;
        const Species& species = compositions.species[s];
        if (species.element == kNoElement) {
            mass = std::numeric_limits<double>::quiet_NaN();
            add_count(species.dummy, 0, atoms[s], structure.counts);
        } else {
            const Element& e = element(species.element);
            mass += e.mass * atoms[s];
            add_count(e.isotope ? "H" : e.symbol, e.number, atoms[s], structure.counts);
        }
    }
    structure.mass = mass;
}

}  // namespace catmllm::cif
