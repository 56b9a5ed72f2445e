#include "batch.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <thread>

#include "../cif/characters.h"
#include "../cif/parser.h"

namespace catmllm::pvcp {
namespace {

constexpr std::size_t kTake = 8;             // texts a thread takes at a time
constexpr std::size_t kTextsPerThread = 16;  // below this a further thread costs more than it brings
constexpr std::size_t kGiant = std::size_t{1} << 20;

bool is_unicode_space(std::uint32_t c) {
    return c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x3000;
}

template <class Unit>
void mark(const void* data, std::size_t n, std::string& bytes) {
    const auto* p = static_cast<const Unit*>(data);
    bytes.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
        const auto c = static_cast<std::uint32_t>(p[i]);
        bytes[i] = static_cast<char>(c < 0x80 ? c : is_unicode_space(c) ? cif::kUnicodeSpace : cif::kUnicodeOther);
    }
}

struct Worker {
    cif::Parser parser;
    std::string bytes;

    void score(const TextRef& text, const Batch& batch, Piece& piece, TextOut& out, double* row) {
        out = TextOut();
        if (text.size > cif::Limits::kTextBytes) {
            out.reason = cif::Reason::kLimit;
        } else {
            const char* data = static_cast<const char*>(text.data);
            if (!text.ascii) {
                mark_characters(text, bytes);
                data = bytes.data();
            }
            out.reason = parser.parse(data, text.size);
        }
        if (out.reason != cif::Reason::kNone) {
            score_failure(batch.weights, row);
            return;
        }
        const cif::Structure& structure = parser.structure();
        score_structure(structure, batch.targets[text.target], batch.weights, batch.thresholds, row);
        keep(structure, piece, out);
    }

    void keep(const cif::Structure& structure, Piece& piece, TextOut& out) {
        out.fields =
            static_cast<std::uint8_t>(structure.fields.lattice | structure.fields.space_group << 1 |
                                      structure.fields.site_loop << 2 | structure.fields.duplicate_labels << 3);
        std::memcpy(out.lattice, structure.lattice.rows, sizeof out.lattice);
        out.n_sites = static_cast<std::uint32_t>(structure.numbers.size());
        out.first_site = piece.numbers.size();
        piece.numbers.insert(piece.numbers.end(), structure.numbers.begin(), structure.numbers.end());
        piece.frac.insert(piece.frac.end(), structure.frac.begin(), structure.frac.end());
        out.first_count = piece.counts.size();
        out.n_counts = static_cast<std::uint32_t>(structure.counts.size());
        for (const cif::Count& count : structure.counts) {
            std::uint32_t dummy = 0;
            if (count.number == 0) {
                dummy = static_cast<std::uint32_t>(piece.dummies.size());
                piece.dummies.emplace_back(count.symbol);
            }
            piece.counts.push_back({static_cast<std::uint8_t>(count.number), dummy, count.amount});
        }
    }
};

// One for each thread that calls in; given back after a giant text.
Worker& worker_of_this_thread(bool renew) {
    thread_local std::unique_ptr<Worker> worker;
    if (!worker || renew) worker = std::make_unique<Worker>();
    return *worker;
}

}  // namespace

void mark_characters(const TextRef& text, std::string& bytes) {
    if (text.unit == 1) mark<std::uint8_t>(text.data, text.size, bytes);
    if (text.unit == 2) mark<std::uint16_t>(text.data, text.size, bytes);
    if (text.unit == 4) mark<std::uint32_t>(text.data, text.size, bytes);
}

void Batch::run(double* rows, unsigned threads) noexcept {
    const std::size_t n = texts.size();
    const unsigned machine = std::max(1u, std::thread::hardware_concurrency());
    std::size_t wanted =
        std::min<std::size_t>(threads == 0 ? machine : threads, (n + kTextsPerThread - 1) / kTextsPerThread);
    wanted = std::max<std::size_t>(wanted, 1);
    std::atomic<std::size_t> next{0};
    const auto work = [&](Worker& worker, std::uint32_t index) {
        Piece& piece = pieces[index];
        for (std::size_t first; (first = next.fetch_add(kTake)) < n;) {
            for (std::size_t i = first; i < std::min(first + kTake, n); ++i) {
                double* row = rows + i * kScoreColumns;
                try {
                    worker.score(texts[i], *this, piece, out[i], row);
                } catch (const std::exception&) {  // no memory for this text
                    out[i] = TextOut();
                    out[i].reason = cif::Reason::kLimit;
                    score_failure(weights, row);
                }
                out[i].piece = index;
                if (texts[i].size > kGiant) worker = Worker();
            }
        }
    };
    std::vector<std::thread> others;
    try {
        out.resize(n);
        pieces.resize(wanted);
        // A site takes about 50 characters; room that is not used costs nothing but addresses.
        std::size_t characters = 0;
        for (const TextRef& text : texts) characters += std::min<std::size_t>(text.size, kGiant);
        for (Piece& piece : pieces) {
            piece.frac.reserve(3 * characters / 50 / wanted);
            piece.numbers.reserve(characters / 50 / wanted);
        }
        others.reserve(wanted);
        for (std::size_t t = 1; t < wanted; ++t) {
            others.emplace_back([&, t] {
                try {
                    Worker own;
                    work(own, static_cast<std::uint32_t>(t));
                } catch (const std::exception&) {
                }
            });
        }
    } catch (const std::exception&) {  // fewer threads than asked for: the rest is done here
    }
    if (out.size() == n && !pieces.empty()) work(worker_of_this_thread(false), 0);
    for (std::thread& thread : others) thread.join();
}

bool is_bare_cif(const char* text, std::size_t size) {
    if (std::memchr(text, '`', size) || std::memchr(text, '~', size)) return false;
    const char* end = text + size;
    while (end > text && cif::is_space(static_cast<unsigned char>(end[-1]))) --end;
    // `<think>`, `</think>`, `<|...|>` and a closing `</s>` are markup
    for (const char* p = text; (p = static_cast<const char*>(std::memchr(p, '<', static_cast<std::size_t>(end - p))));
         ++p) {
        const auto at = [&](int k) { return end - p > k ? static_cast<char>(p[k] | 0x20) : '\0'; };
        if (at(1) == ('|' | 0x20) || at(1) == 't' || (at(1) == '/' && at(2) == 't')) return false;
        if (end - p == 4 && std::memcmp(p, "</s>", 4) == 0) return false;
    }
    // the last line is a row with numbers and without prose
    const char* line = end;
    while (line > text && line[-1] != '\n' && end - line < 400) --line;
    int wordy = 0;
    bool digits = false;
    for (const char* p = line; p < end;) {
        while (p < end && cif::is_space(static_cast<unsigned char>(*p))) ++p;
        const char* word = p;
        bool numeral = false;
        for (; p < end && !cif::is_space(static_cast<unsigned char>(*p)); ++p)
            numeral |= cif::is_digit(static_cast<unsigned char>(*p));
        digits |= numeral;
        wordy += !numeral && p - word > 1;
    }
    if (!digits || wordy > 2) return false;
    // a block begins somewhere at a line start
    for (const char* p = text; p + 5 <= end; ++p) {
        while (p < end && cif::is_space(static_cast<unsigned char>(*p))) ++p;
        if (end - p >= 5 && std::memcmp(p, "data_", 5) == 0) return true;
        p = static_cast<const char*>(std::memchr(p, '\n', static_cast<std::size_t>(end - p)));
        if (!p) return false;
    }
    return false;
}

Profile profile(const TextRef& text, int repeats) {
    using Clock = std::chrono::steady_clock;
    const auto seconds = [](Clock::time_point a, Clock::time_point b) {
        return std::chrono::duration<double>(b - a).count();
    };
    Profile result;
    Worker worker;
    std::string bytes;
    if (text.ascii) {
        bytes.assign(static_cast<const char*>(text.data), text.size);
    } else {
        mark_characters(text, bytes);
    }
    geometry::DistanceScratch distance;
    const Target none;
    double row[kScoreColumns];
    const auto least = [](double& kept, double seconds) { kept = kept == 0 ? seconds : std::min(kept, seconds); };
    cif::ScanMasks masks;
    cif::Arena arena;
    cif::LoopScratch loops;
    cif::Block block;
    std::vector<cif::AffineOperation> operations;
    const std::size_t begin = std::min(bytes.find("data_"), bytes.size());
    const std::string_view clean = cif::cleaned(std::string_view(bytes).substr(begin), arena);
    const std::string body(clean);
    for (int i = 0; i < repeats; ++i) {
        arena.reset();
        block.clear();
        const auto t0 = Clock::now();
        cif::scan(body.data(), body.size(), masks);
        cif::Tokenizer tokens(body.data(), masks, 0, static_cast<std::uint32_t>(body.size()), arena);
        const bool read = !body.empty() && cif::read_block(tokens, arena, loops, block).ok();
        const auto t1 = Clock::now();
        if (read) (void)cif::symmetry_operations(block, operations);
        const auto t2 = Clock::now();
        const cif::Reason reason = worker.parser.parse(bytes.data(), bytes.size());
        const auto t3 = Clock::now();
        least(result.tokenise, seconds(t0, t1));
        least(result.symmetry, seconds(t1, t2));
        least(result.parse, seconds(t2, t3));
        if (reason != cif::Reason::kNone) continue;
        const cif::Structure& structure = worker.parser.structure();
        const double d = geometry::min_distance(structure.lattice, structure.frac.data(), structure.numbers.size(),
                                                distance);
        const auto t4 = Clock::now();
        score_structure(structure, none, Weights(), Thresholds(), row);
        const auto t5 = Clock::now();
        least(result.distance, seconds(t3, t4) + (d < 0 ? 1 : 0));
        least(result.score, seconds(t4, t5));
        result.n_sites = static_cast<std::uint32_t>(structure.numbers.size());
    }
    if (result.n_sites != 0) result.parse = std::max(0.0, result.parse - result.distance);  // it is part of it
    return result;
}

}  // namespace catmllm::pvcp
