#include "batch.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <thread>

#include "../cif/characters.h"
#include "threads.h"

namespace catmllm::pvcp {
namespace {

constexpr std::size_t kTake = 8;                     // texts that a thread takes at a time, at most
constexpr std::size_t kCharactersPerThread = 16384;  // below this a further thread costs more than it brings
constexpr std::size_t kGiant = std::size_t{1} << 20;

bool is_unicode_space(std::uint32_t c) {
    return c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 ||
           c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

template <class Unit>
void mark(const void* data, std::size_t n, std::string& bytes) {
    const auto* p = static_cast<const Unit*>(data);
    bytes.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
        const auto c = static_cast<std::uint32_t>(p[i]);
        bytes[i] = static_cast<char>(c < 0x80              ? c
                                     : is_unicode_space(c) ? cif::kUnicodeSpace
                                                           : cif::kUnicodeOther);
    }
}

// The bytes of characters.h, from a text with characters beyond ASCII.
void mark_characters(const TextRef& text, std::string& bytes) {
    if (text.unit == 1) mark<std::uint8_t>(text.data, text.size, bytes);
    if (text.unit == 2) mark<std::uint16_t>(text.data, text.size, bytes);
    if (text.unit == 4) mark<std::uint32_t>(text.data, text.size, bytes);
}

thread_local std::unique_ptr<Reader> thread_reader;

void score_text(Reader& reader, const TextRef& text, const Batch& batch, TextOut& out, double* row) {
    out = TextOut();
    out.reason = reader.read(text, batch.extract);
    if (out.reason != cif::Reason::kNone) {
        score_failure(batch.weights, row);
        return;
    }
    const cif::Structure& structure = reader.structure();
    score_structure(structure, batch.targets[text.target], batch.weights, batch.thresholds, row);
    const cif::Fields& fields = structure.fields;
    out.fields = static_cast<std::uint8_t>(fields.lattice | fields.space_group << 1 | fields.site_loop << 2 |
                                           fields.duplicate_labels << 3);
}

}  // namespace

cif::Reason Reader::read(const TextRef& text, bool extract) {
    cif_ = {static_cast<const char*>(text.data), text.size};
    if (!text.ascii) {
        mark_characters(text, bytes_);
        cif_ = bytes_;
    }
    if (!extract) return parser_.parse(cif_.data(), cif_.size());
    std::string_view tried;
    cif::Reason reason = cif::Reason::kNoBlock;
    const Reads reads = [&](std::string_view candidate) -> std::size_t {
        tried = candidate;
        reason = parser_.parse(candidate.data(), candidate.size());
        return reason == cif::Reason::kNone ? parser_.n_blocks() : 0;
    };
    cif_ = extract_cif(cif_, reads, extraction_);
    if (cif_.data() != tried.data() || cif_.size() != tried.size()) reads(cif_);
    return reason;
}

Reader& reader_of_this_thread() {
    if (!thread_reader) thread_reader = std::make_unique<Reader>();
    return *thread_reader;
}

void forget_giant(const TextRef& text) {
    if (text.size > kGiant) thread_reader.reset();
}

void Batch::run(double* rows, unsigned threads) {
    const std::size_t n = texts.size();
    out.resize(n);
    std::size_t characters = 0;
    for (const TextRef& text : texts) characters += text.size;
    static const unsigned cores = std::max(1u, std::thread::hardware_concurrency());  // asking takes 15 µs
    const std::size_t most = threads == 0 ? cores : threads;
    const std::size_t wanted =
        std::max<std::size_t>(1, std::min({most, n, characters / kCharactersPerThread}));
    const std::size_t take = std::min(kTake, n / (32 * wanted) + 1);
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t first; (first = next.fetch_add(take)) < n;) {
            for (std::size_t i = first; i < std::min(first + take, n); ++i) {
                double* row = rows + i * kScoreColumns;
                try {
                    score_text(reader_of_this_thread(), texts[i], *this, out[i], row);
                } catch (const std::exception&) {  // no memory for this text
                    out[i] = TextOut();
                    out[i].reason = cif::Reason::kLimit;
                    score_failure(weights, row);
                }
                forget_giant(texts[i]);
            }
        }
    };
    run_together(wanted - 1, work);
}

Profile profile(const TextRef& text, int repeats) {
    using Clock = std::chrono::steady_clock;
    const auto seconds = [](Clock::time_point a, Clock::time_point b) {
        return std::chrono::duration<double>(b - a).count();
    };
    Profile result;
    Reader reader;
    cif::Parser parser;
    (void)reader.read(text, true);
    const std::string bytes(reader.cif());
    std::string whole;
    Extraction extraction;
    if (text.ascii) {
        whole.assign(static_cast<const char*>(text.data), text.size);
    } else {
        mark_characters(text, whole);
    }
    geometry::DistanceScratch distance;
    const Target none;
    double row[kScoreColumns];
    const auto least = [](double& kept, double seconds) {
        kept = kept == 0 ? seconds : std::min(kept, seconds);
    };
    cif::ScanMasks masks;
    cif::Arena arena;
    cif::LoopScratch loops;
    cif::Block block;
    cif::KnownComponents components;
    std::vector<cif::AffineOperation> operations;
    const std::size_t begin = std::min(bytes.find("data_"), bytes.size());
    const std::string_view clean = cif::cleaned(std::string_view(bytes).substr(begin), arena);
    const std::string body(clean);
    for (int i = 0; i < repeats && bytes.size() <= cif::Limits::kTextBytes; ++i) {
        arena.reset();
        block.clear();
        const auto start = Clock::now();
        (void)extract_cif(whole, [](std::string_view) { return std::size_t{1}; }, extraction);
        const auto t0 = Clock::now();
        cif::scan(body.data(), body.size(), masks);
        cif::Tokenizer tokens(body.data(), masks, 0, static_cast<std::uint32_t>(body.size()), arena);
        const bool read = !body.empty() && cif::read_block(tokens, arena, loops, block).ok();
        const auto t1 = Clock::now();
        if (read) (void)cif::symmetry_operations(block, components, operations);
        const auto t2 = Clock::now();
        const cif::Reason reason = parser.parse(bytes.data(), bytes.size());
        const auto t3 = Clock::now();
        least(result.extract, seconds(start, t0));
        least(result.tokenise, seconds(t0, t1));
        least(result.symmetry, seconds(t1, t2));
        least(result.parse, seconds(t2, t3));
        if (reason != cif::Reason::kNone) continue;
        const cif::Structure& structure = parser.structure();
        const double d = geometry::min_distance(structure.lattice, structure.frac.data(),
                                                structure.numbers.size(), distance);
        const auto t4 = Clock::now();
        score_structure(structure, none, Weights(), Thresholds(), row);
        const auto t5 = Clock::now();
        least(result.distance, seconds(t3, t4) + (d < 0 ? 1 : 0));
        least(result.score, seconds(t4, t5));
        result.n_sites = static_cast<std::uint32_t>(structure.numbers.size());
    }
    if (result.n_sites != 0)
        result.parse = std::max(0.0, result.parse - result.distance);  // it is part of it
    return result;
}

}  // namespace catmllm::pvcp
