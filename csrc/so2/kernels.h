// Everything that depends on the instruction set, see vector/dispatch.h.
#include "../vector/run.h"
#include "sizes.h"
#include "table.h"

#include "../vector/begin.h"

namespace catmllm::so2::VECTOR_SET {

#include "../vector/lanes.h"
#include "../vector/functions.h"
#include "product.h"
#include "rotation.h"
#include "activation.h"
#include "attention.h"
#include "forward.h"
#include "backward.h"
#include "sum.h"

const Table table = {
    [](const so2_message* p) { return p->dtype == 4 ? forward<float>(*p) : forward<double>(*p); },
    [](const so2_message* p) { return p->dtype == 4 ? backward<float>(*p) : backward<double>(*p); },
    [](const so2_sum* p) { return p->dtype == 4 ? sum_forward<float>(*p) : sum_forward<double>(*p); },
    [](const so2_sum* p) { return p->dtype == 4 ? sum_backward<float>(*p) : sum_backward<double>(*p); },
};

}  // namespace catmllm::so2::VECTOR_SET

#include "../vector/end.h"
