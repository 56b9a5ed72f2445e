// The cell of a block: CifParser.get_lattice.
#include <string>
#include <string_view>

#include "characters.h"
#include "number.h"
#include "steps.h"
#include "symmetry.h"

namespace catmllm::cif {
namespace {

constexpr double kThinnest = 0.01;  // Å

bool value_as_number(const Value& value, double& number) {
    if (!value.is_list()) return str2float(value.scalar(), number);
    return value.size() == 1 && strip(value[0]) != "." && str2float(value[0], number);
}

struct CrystalSystem {
    const char* name;
    const char* arguments;  // which of the six parameters, by index
};
constexpr CrystalSystem kCrystalSystems[] = {{"cubic", "0"},          {"tetragonal", "02"},
                                             {"orthorhombic", "012"}, {"monoclinic", "0124"},
                                             {"hexagonal", "02"},     {"rhombohedral", "03"}};

// Lattice.<setting>(...) with the parameters that the file does give.
Status lattice_of_setting(const Block& block, const CrystalSystem& setting, geometry::Lattice& lattice) {
    double given[6] = {0, 0, 0, 0, 0, 0};
    for (const char* p = setting.arguments; *p; ++p) {
        const Value& value = block[key_at(Key::kCellLengthA, *p - '0')];
        // A missing one makes pymatgen call the constructor with too few arguments: TypeError.
        if (!value.present()) return reject_text(Reason::kCell);
        if (!value_as_number(value, given[*p - '0'])) return skip_block(Reason::kCell);
    }
    const double a = given[0];
    const std::string_view name = setting.name;
    if (name == "cubic") {
        lattice = geometry::Lattice{{a, 0, 0, 0, a, 0, 0, 0, a}};
        return ok();
    }
    double lengths[3] = {a, a, given[2]};
    double angles[3] = {90, 90, 90};
    if (name == "orthorhombic" || name == "monoclinic") lengths[1] = given[1];
    if (name == "monoclinic") angles[1] = given[4];
    if (name == "hexagonal") angles[2] = 120;
    if (name == "rhombohedral") {
        lengths[2] = a;
        angles[0] = angles[1] = angles[2] = given[3];
    }
    lattice = geometry::lattice_from_parameters(lengths, angles);
    return ok();
}

// The cell of a crystal system that is named instead of six parameters.
Status lattice_of_system(const Block& block, geometry::Lattice& lattice, bool& found) {
    for (Key key : {Key::kSymmetryCellSetting, Key::kSpaceGroupCrystalSystem}) {
        const Value& value = block[key];
        if (!value.truthy()) return ok();
        if (value.is_list()) return reject_text(Reason::kCell);  // a list has no lower()
        std::string name(value.scalar());
        for (char& c : name) c = to_lower(static_cast<unsigned char>(c));
        for (const CrystalSystem& setting : kCrystalSystems) {
            if (name != setting.name) continue;
            found = true;
            return lattice_of_setting(block, setting, lattice);
        }
        if (is_lattice_attribute(name)) return reject_text(Reason::kCell);  // called with the wrong arguments
    }
    return ok();
}

}  // namespace

Status read_lattice(const Block& block, geometry::Lattice& lattice, bool& found) {
    found = false;
    double parameters[6];
    bool complete = true;
    for (int i = 0; i < 6 && complete; ++i) {
        const Value& value = block[key_at(Key::kCellLengthA, i)];
        complete = value.present();
        if (complete && !value_as_number(value, parameters[i])) return skip_block(Reason::kCell);
    }
    if (complete) {
        found = true;
        lattice = geometry::lattice_from_parameters(parameters, parameters + 3);
    } else if (const Status status = lattice_of_system(block, lattice, found); !status.ok()) {
        return status;
    }
    if (!found) return ok();
    double spacings[3];
    if (!geometry::plane_spacings(lattice, spacings)) return skip_block(Reason::kCell);
    for (double spacing : spacings)
        if (spacing < kThinnest) return skip_block(Reason::kCell);
    return ok();
}

}  // namespace catmllm::cif
