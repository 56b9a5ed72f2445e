#include "parser.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "characters.h"

namespace catmllm::cif {

// re.split(r"^\s*data_", "x\n" + text, MULTILINE): `data_` behind nothing but white space since a newline.
void Parser::find_blocks(const char* text, std::size_t size) {
    extents_.clear();
    const auto n = static_cast<std::uint32_t>(size);
    for (std::size_t w = 0; w * 64 < size; ++w) {
        for (std::uint64_t bits = masks_.d_starts[w]; bits; bits &= bits - 1) {
            const auto p =
                static_cast<std::uint32_t>(w * 64) + static_cast<std::uint32_t>(__builtin_ctzll(bits));
            if (n - p < 5 || std::memcmp(text + p, "data_", 5) != 0) continue;
            std::uint32_t q = p;
            while (q > 0 && text[q - 1] != '\n' &&
                   is_space_or_unicode(static_cast<unsigned char>(text[q - 1])))
                --q;
            if (q > 0 && text[q - 1] != '\n') continue;
            if (!extents_.empty()) extents_.back().end = p;
            extents_.push_back({p, n});
        }
    }
}

Reason Parser::parse(const char* text, std::size_t size) {
    if (size > Limits::kTextBytes) return Reason::kLimit;
    arena_.reset();
    scan(text, size, masks_);
    find_blocks(text, size);
    if (extents_.empty()) return Reason::kNoBlock;
    if (extents_.size() > Limits::kBlocks) return Reason::kLimit;
    return parse_blocks(text);
}

Reason Parser::parse_blocks(const char* text) {
    n_blocks_ = 0;
    bool magnetic = false;
    bool incommensurate = false;
    std::unordered_map<std::string_view, std::size_t> headers;
    const bool many = extents_.size() > 1;
    for (const Extent& extent : extents_) {
        const std::string_view body(text + extent.begin, extent.end - extent.begin);
        const std::string_view first_line = body.substr(5, body.substr(5).find('\n'));
        if (first_line.find("powder_pattern") != std::string_view::npos) continue;
        if (blocks_.size() == n_blocks_) blocks_.emplace_back();
        Block& block = blocks_[n_blocks_];
        block.clear();
        Status status;
        const bool unclean = masks_.has_high ||
                             (masks_.has_hash && body.find('#') != std::string_view::npos) ||
                             (masks_.has_semicolon && body.find(';') != std::string_view::npos);
        if (unclean) {
            const std::string_view clean = cleaned(body, arena_);
            scan(clean.data(), clean.size(), clean_masks_);
            Tokenizer tokens(clean.data(), clean_masks_, 0, static_cast<std::uint32_t>(clean.size()), arena_);
            status = read_block(tokens, arena_, loops_, block);
        } else {
            Tokenizer tokens(text, masks_, extent.begin, extent.end, arena_);
            status = read_block(tokens, arena_, loops_, block);
        }
        if (!status.ok()) return status.reason;
        if (many) {  // blocks of one name: the last content, at the place of the first
            const auto [entry, inserted] = headers.emplace(block.header, n_blocks_);
            if (!inserted) {
                std::swap(blocks_[entry->second], block);
                continue;
            }
        }
        ++n_blocks_;
    }
    for (std::size_t i = 0; i < n_blocks_; ++i) {
        magnetic |= blocks_[i].magnetic;
        incommensurate |= blocks_[i].incommensurate;
    }
    for (std::size_t i = 0; i < n_blocks_; ++i) {
        const Status status = sanitize(blocks_[i], arena_);
        if (!status.ok()) return status.reason;
    }
    Reason blame = Reason::kNone;
    bool found = false;
    for (std::size_t i = 0; i < n_blocks_; ++i) {
        // The first structure is the answer, the later blocks are built for the errors they may raise.
        const int target = found ? 1 - found_ : found_;
        const Status status =
            build_structure(blocks_[i], magnetic, incommensurate, scratch_, structures_[target]);
        if (status.outcome == Outcome::kRejectText) return status.reason;
        if (status.ok()) {
            found = true;
        } else if (blame == Reason::kNone) {
            blame = status.reason;
        }
    }
    if (found) return Reason::kNone;
    return n_blocks_ == 0 ? Reason::kNoBlock : blame;
}

}  // namespace catmllm::cif
