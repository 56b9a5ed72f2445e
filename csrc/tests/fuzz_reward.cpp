// libFuzzer target: any bytes are a text; parsing, distances and scores must end quickly, within bounds, with finite
// rewards. Build and run: `make fuzz`.
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
    const std::string text(reinterpret_cast<const char*>(data), size);  // exact size: reads past the end are seen
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
    std::string joined;
    std::vector<pvcp::Span> parts;
    const std::string_view found = pvcp::extract_cif(text, joined, parts);
    std::string together;
    for (const pvcp::Span part : parts) together += text.substr(part.first, part.second - part.first);
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
