// libFuzzer target: any bytes are a text; parsing, distances and scores must end quickly, within bounds, with
// finite rewards. Build and run: `make fuzz`.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "../cif/parser.h"
#include "../pvcp/batch.h"
#include "../pvcp/score.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace catmllm;
    static cif::Parser parser;
    const std::string text(reinterpret_cast<const char*>(data),
                           size);  // exact size: reads past the end are seen
    double row[pvcp::kScoreColumns];
    pvcp::Target target;
    target.entries = {{78, 9.0}, {8, 1.0}};
    const cif::Reason reason = parser.parse(text.data(), text.size());
    if (reason == cif::Reason::kNone) {
        pvcp::score_structure(parser.structure(), target, pvcp::Weights(), pvcp::Thresholds(), row);
    } else {
        pvcp::score_failure(pvcp::Weights(), row);
    }
    for (int i = 0; i < pvcp::kSites; ++i)
        if (!std::isfinite(row[i])) std::abort();
    if (row[pvcp::kTotal] < -15.001 || row[pvcp::kTotal] > 10.001) std::abort();
    // What is found is made of parts of the text.
    static pvcp::Extraction memory;
    const pvcp::Reads reads = [&](std::string_view candidate) -> std::size_t {
        return parser.parse(candidate.data(), candidate.size()) == cif::Reason::kNone ? parser.n_blocks() : 0;
    };
    std::string found(pvcp::extract_cif(text, reads, memory));
    std::string together;
    for (const pvcp::Span part : memory.parts) {
        if (part.first != pvcp::kCharacter) together += text.substr(part.first, part.second - part.first);
        if (part.first == pvcp::kCharacter)
            together += static_cast<char>(part.second < 0x80 ? part.second : 0x81);
    }
    for (std::string* s : {&together, &found})
        for (char& c : *s)
            if (static_cast<unsigned char>(c) >= 0x80) c = '\x81';
    if (found != together) std::abort();

    // The same bytes as a text with wider characters, through the batch.
    pvcp::Batch batch;
    pvcp::TextRef ref;
    ref.data = text.data();
    ref.unit = size % 4 == 0 ? 4 : size % 2 == 0 ? 2 : 1;
    ref.size = size / static_cast<std::size_t>(ref.unit);
    ref.ascii = false;
    batch.texts = {ref};
    batch.targets = {target};
    batch.run(row, 1);
    return 0;
}
