// What sits on the sites of a block: species, and the compositions that they make up.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "elements.h"

namespace catmllm::cif {

// An element or a dummy, with an oxidation state where the file lists them.
struct Species {
    int element = kNoElement;  // index into the element table; kNoElement for a dummy
    std::string_view dummy;
    bool has_oxidation = false;
    double oxidation = 0;
};

struct Amount {
    std::uint32_t species;
    double value;
};

// Amounts [first, first + size) of the block's. Up to the next power of two the amounts behind are its own.
struct Composition {
    std::uint32_t first;
    std::uint32_t size;
};

// All species and compositions of a block, with the operations of pymatgen's Composition.
struct Compositions {
    std::vector<Species> species;
    std::vector<Amount> amounts;

    void clear();
    // The species' index; a new one is added.
    std::uint32_t id_of(const Species& wanted);
    // Composition.__getitem__: an element stands for all species with its symbol (D and T are written H).
    double amount_of(const Composition& composition, const Species& wanted) const;
    // Composition.__eq__
    bool equal(const Composition& a, const Composition& b) const;
    // Composition.__lt__: by the amount of the most electropositive species in which they differ. No order
    // that sorting may rely on: amounts within the tolerance are the same.
    bool less(const Composition& a, const Composition& b) const;
    // Composition.__add__, the species of `to` first. In place: many rows may be added to one, of many
    // species.
    void add(Composition& to, const Composition& added);
    // {O, H} without oxidation states: O with implicit hydrogens, which are left out of the structure.
    bool is_water(const Composition& composition) const;
    // The occupancy of a site, which pymatgen holds against 1.
    double total(const Composition& composition) const;
};

}  // namespace catmllm::cif
