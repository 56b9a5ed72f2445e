// Which parts a block has, whatever they say: what evaluations report of generated texts.
#include "characters.h"
#include "steps.h"

namespace catmllm::cif {
namespace {

constexpr std::uint32_t kFree = 0xffffffff;

// A label of up to eight characters is its own word, a longer one has a hash.
std::uint64_t word_of(std::string_view label) {
    if (label.size() - 1 < 8) return left_word(label.data(), label.size());
    std::uint64_t word = label.size();
    for (char c : label) word = (word ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
    return word;
}

bool any_repeated(const Value& labels, LabelScratch& scratch) {
    const std::uint32_t n = labels.size();
    std::size_t size = 64;
    while (size < 2 * std::size_t{n}) size *= 2;
    std::vector<std::uint32_t>& row_in_slot = scratch.row_in_slot;
    row_in_slot.assign(size, kFree);
    if (scratch.words.size() < n) scratch.words.resize(n);
    std::uint64_t* words = scratch.words.data();
    for (std::uint32_t i = 0; i < n; ++i) {
        const std::string_view label = labels[i];
        const std::uint64_t word = words[i] = word_of(label);
        std::uint64_t hash = word * 0x9E3779B97F4A7C15ull;
        hash ^= hash >> 32;
        std::size_t slot = hash & (size - 1);
        for (; row_in_slot[slot] != kFree; slot = (slot + 1) & (size - 1)) {
            const std::uint32_t other = row_in_slot[slot];
            if (words[other] == word && labels[other] == label) return true;
        }
        row_in_slot[slot] = i;
    }
    return false;
}

}  // namespace

Fields fields_of(const Block& block, LabelScratch& scratch) {
    Fields fields;
    fields.lattice = true;
    for (int i = 0; i < 6; ++i) fields.lattice &= block[key_at(Key::kCellLengthA, i)].truthy();
    for (Key key :
         {Key::kSymops0, Key::kSymops2, Key::kName0, Key::kName6, Key::kName4, Key::kNumber0, Key::kNumber2})
        fields.space_group |= block[key].truthy();
    const Value& labels = block[Key::kSiteLabel];
    fields.site_loop = labels.is_list();
    for (Key key : {Key::kSiteFractX, Key::kSiteFractY, Key::kSiteFractZ})
        fields.site_loop &= block[key].is_list();
    fields.duplicate_labels = labels.is_list() && any_repeated(labels, scratch);
    return fields;
}

}  // namespace catmllm::cif
