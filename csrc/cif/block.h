// One data block as pymatgen's CifBlock holds it: values and loop columns by key.
//
// Keys the structure is built from have a fixed slot; every other key is kept only by name and length (rare
// rules need it).
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "status.h"
#include "tokens.h"

namespace catmllm::cif {

enum class Key : std::uint8_t {
    kCellLengthA,
    kCellLengthB,
    kCellLengthC,
    kCellAngleAlpha,
    kCellAngleBeta,
    kCellAngleGamma,
    kSymmetryCellSetting,
    kSpaceGroupCrystalSystem,
    kSymops0,  // 4 spellings, in the order in which pymatgen tries them
    kSymops1,
    kSymops2,
    kSymops3,
    kName0,  // 12 spellings of the space group's name
    kName1,
    kName2,
    kName3,
    kName4,
    kName5,
    kName6,
    kName7,
    kName8,
    kName9,
    kName10,
    kName11,
    kNumber0,  // 4 spellings of its number
    kNumber1,
    kNumber2,
    kNumber3,
    kSiteLabel,
    kSiteTypeSymbol,
    kSiteFractX,
    kSiteFractY,
    kSiteFractZ,
    kSiteOccupancy,
    kSiteAttachedHydrogens,
    kTypeSymbol,
    kTypeOxidation,
    kMomentLabel,
    kMomentX,
    kMomentY,
    kMomentZ,
    kMagneticOperations,  // the names behind `_sanitize_data`'s renaming, dots and underscores alike
    kMagneticCentering,
    kMagneticName,
    kMagneticNumber,
    kMagneticTransform,
    kCount,
};

constexpr Key key_at(Key first, int offset) { return static_cast<Key>(static_cast<int>(first) + offset); }

// A value of the block's dictionary: absent, a string, or the list of a loop column.
class Value {
  public:
    enum Kind : std::uint8_t { kAbsent, kScalar, kColumn };

    bool present() const { return kind_ != kAbsent; }
    bool is_list() const { return kind_ == kColumn; }
    bool truthy() const { return kind_ != kAbsent && size_ > 0; }
    // len(value): characters of a string, items of a list
    std::uint32_t size() const { return size_; }
    std::string_view scalar() const { return {text_, size_}; }
    // value[i], i < size(); a string is indexed character by character
    std::string_view operator[](std::uint32_t i) const {
        if (kind_ == kColumn) return tokens_[std::size_t{i} * stride_].view();
        return {text_ + i, 1};
    }
    // The tokens of a list, `stride` apart
    const Token* tokens() const { return tokens_; }
    std::uint32_t stride() const { return stride_; }

    static Value scalar_of(std::string_view text) {
        Value v;
        v.kind_ = kScalar;
        v.text_ = text.data();
        v.size_ = static_cast<std::uint32_t>(text.size());
        return v;
    }
    static Value column_of(const Token* first, std::uint32_t stride, std::uint32_t rows) {
        Value v;
        v.kind_ = kColumn;
        v.tokens_ = first;
        v.stride_ = stride;
        v.size_ = rows;
        return v;
    }

  private:
    union {
        const char* text_;
        const Token* tokens_;
    };
    std::uint32_t size_ = 0;
    std::uint32_t stride_ = 1;
    Kind kind_ = kAbsent;

  public:
    Value() : text_(nullptr) {}
};

struct OtherKey {
    std::string_view name;
    std::uint32_t rows;  // of its list
    bool is_list;
};

struct Block {
    std::string_view header;
    Value values[static_cast<std::size_t>(Key::kCount)];
    std::vector<OtherKey> others;
    bool magnetic = false;
    bool incommensurate = false;

    const Value& operator[](Key key) const { return values[static_cast<std::size_t>(key)]; }
    Value& operator[](Key key) { return values[static_cast<std::size_t>(key)]; }
    void clear();
    bool has_other(std::string_view name) const;
};

struct LoopScratch {
    std::vector<std::string_view> columns;
    std::vector<std::int16_t> slots;
};

// Reads the tokens of a block into `block`; `tokens` yields the header first.
Status read_block(Tokenizer& tokens, Arena& arena, LoopScratch& scratch, Block& block);

// CifParser._sanitize_data: attached hydrogens and Pauling-file rows. (Thirds are rounded where coordinates
// are read, other spellings of magnetic keys are taken for the usual ones as they come.)
Status sanitize(Block& block, Arena& arena);

}  // namespace catmllm::cif
