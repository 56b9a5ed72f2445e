// Symmetry operations: from "x, y, z" strings and from space-group names and numbers.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "block.h"
#include "status.h"

namespace catmllm::cif {

struct AffineOperation {
    double rotation[9];
    double translation[3];

    // Component k of the image of x; every product is formed, so that 0 * inf is nan as in the matrix
    // product. The sum is that of the kernels for 4 x 4 matrices in OpenBLAS, which NumPy carries, on
    // processors with AVX2: two lanes, then one to the other. On a threshold (four digits of a third) another
    // order gives another number of sites.
    double component(int k, const double* x) const {
        const double* r = rotation + 3 * k;
        return (r[0] * x[0] + r[2] * x[2]) + (r[1] * x[1] + translation[k]);
    }
    bool is_identity() const;
};

// What components such as "-y+1/2" were found to mean, by their letters: a few dozen make up nearly all
// operations.
struct KnownComponents {
    struct Component {
        std::uint64_t words[2];
        std::uint32_t size = 0;  // 0: free
        double rotation[3];
        double translation;
    };
    static constexpr std::size_t kSlots = 256;
    Component slots[kSlots];
};

// SymmOp.from_xyz_str. kSkipBlock stands for ValueError, kRejectText for any other exception.
Status operation_from_xyz(std::string_view text, KnownComponents& known, AffineOperation& operation);

// CifParser.get_symops and, for magnetic files, get_magsymops.
Status symmetry_operations(const Block& block, KnownComponents& known,
                           std::vector<AffineOperation>& operations);
Status magnetic_operations(const Block& block, KnownComponents& known,
                           std::vector<AffineOperation>& operations);

// Appends the operations of the magnetic group that the block names, as MagneticSpaceGroup gives them.
Status magnetic_group_operations(const Block& block, std::vector<AffineOperation>& operations);

// Is `name` an attribute of pymatgen's Lattice? A cell setting that is none is passed over.
bool is_lattice_attribute(std::string_view name);

}  // namespace catmllm::cif
