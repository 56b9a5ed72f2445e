// The oxidation states that a file lists by symbol: CifParser._parse_oxi_states.
#pragma once

#include <string_view>
#include <vector>

#include "block.h"
#include "status.h"

namespace catmllm::cif {

class OxidationStates {
  public:
    Status read(const Block& block);
    // Does the file list them? Then every species has one, 0 where its symbol is not in the list.
    bool present() const { return present_; }
    // The state of a symbol; false, and `value` as it was, where it is not in the list.
    bool find(std::string_view symbol, double& value) const;

  private:
    struct State {
        std::string_view symbol;
        double value;
    };
    std::vector<State> states_;
    bool present_ = false;
};

}  // namespace catmllm::cif
