// Finds the CIF inside a model's answer: chat markup, reasoning, code fences, JSON and prose around it go.
// What stands inside the CIF is never repaired.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cif_end.h"

namespace catmllm::pvcp {

constexpr std::size_t kCharacter = static_cast<std::size_t>(-1);

// A part of a text: [first, second); with kCharacter first the one character whose code is second (of an
// escape).
using Span = std::pair<std::size_t, std::size_t>;

// Reads a text as strict mode does: the number of its `data_` blocks, 0 where it is refused.
using Reads = std::function<std::size_t(std::string_view)>;

// What extract_cif needs, reused from answer to answer; `parts` are those of the answer that make up its
// result.
struct Extraction {
    std::vector<Span> parts;
    std::string text;       // of a CIF whose lines have a margin
    std::string unescaped;  // of a JSON string
    std::vector<Span> unescaped_parts;
    std::unique_ptr<Extraction> inner;  // of the CIF in it
    std::vector<Span> segments;
    LineScratch lines;
};

// The CIF of the answer: the last whole one outside of reasoning, up to what cannot belong to it.
//
// 1. Of a chat the last assistant turn counts, up to its end; reasoning (`<think>` and its like, Harmony's
//    channel `analysis`) is passed over, up to the end where it does not close by the same name, from the
//    begin where it was not opened.
// 2. Tags, special tokens and code fences are borders that no CIF crosses. In a CIF they are none where its
//    grammar makes them a value: in quotes, in a text field, behind a key.
// 3. A CIF begins with `data_` at a line's begin or right behind a border and ends as length_of_cif says. A
//    `data_` in the middle of a line counts where there is no other.
// 4. Of several the last that `reads` accepts is the answer's, quoted, indented and escaped ones among them;
//    where it accepts none, the last.
//
// `answer`: bytes as ../cif/characters.h describes them. The view is of the answer or of a text in `memory`.
std::string_view extract_cif(std::string_view answer, const Reads& reads, Extraction& memory);

}  // namespace catmllm::pvcp
