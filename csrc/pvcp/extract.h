// Finds the CIF inside a model's answer: chat markup, `<think>` passages, code fences and prose around it go. What
// stands inside the CIF is never repaired.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace catmllm::pvcp {

// A part of a text: [first, second).
using Span = std::pair<std::size_t, std::size_t>;

// The parts of the answer that make up the CIF, in order; the answer without its markup where no block is seen.
//
// 1. Only the last assistant turn counts; `<think>` passages are dropped, an unclosed one to the end.
// 2. Of code fences that hold a `data_` line the last one is taken (an open fence runs to the end).
// 3. Prose before the first `data_` line goes, and so does prose behind the last row: from the first line after the
// last
//    key (`_name`, `loop_`) that has three or more plain words.
//
// `answer`: bytes as ../cif/characters.h describes them. The view is of the answer, or of `joined` where the CIF is
// in several parts; `parts` says which they are.
std::string_view extract_cif(std::string_view answer, std::string& joined, std::vector<Span>& parts);

}  // namespace catmllm::pvcp
