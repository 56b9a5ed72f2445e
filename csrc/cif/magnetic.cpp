// Magnetic moments of a block: CifParser._parse_magmoms.
#include "number.h"
#include "steps.h"

namespace catmllm::cif {

Status check_moments(const Block& block) {
    const Value& labels = block[Key::kMomentLabel];
    for (std::uint32_t i = 0; i < labels.size(); ++i) {
        for (int k = 0; k < 3; ++k) {
            const Value& column = block[key_at(Key::kMomentX, k)];
            double value = 0;
            if (!column.present()) return ok();  // then pymatgen takes the structure for one without moments
            if (i >= column.size()) return reject_text(Reason::kMagnetic);
            if (!str2float(column[i], value)) return ok();
        }
    }
    return ok();
}

}  // namespace catmllm::cif
