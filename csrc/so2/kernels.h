// Everything that depends on the instruction set. The three files kernels_*.cpp include this one, each with its own
// SO2_LEVEL, name of the namespace and compiler target.

namespace catmllm::so2::SO2_SET {

struct Full {};
struct Part {
    int n;
};

#include "lanes.h"
#include "functions.h"
#include "product.h"
#include "rotation.h"
#include "activation.h"
#include "attention.h"
#include "forward.h"
#include "backward.h"
#include "sum.h"

}  // namespace catmllm::so2::SO2_SET

namespace catmllm::so2 {

const char* SO2_FORWARD(const so2_message& p) {
    return p.dtype == 4 ? SO2_SET::forward<float>(p) : SO2_SET::forward<double>(p);
}
const char* SO2_BACKWARD(const so2_message& p) {
    return p.dtype == 4 ? SO2_SET::backward<float>(p) : SO2_SET::backward<double>(p);
}

const char* SO2_SUM_FORWARD(const so2_sum& p) {
    return p.dtype == 4 ? SO2_SET::sum_forward<float>(p) : SO2_SET::sum_forward<double>(p);
}
const char* SO2_SUM_BACKWARD(const so2_sum& p) {
    return p.dtype == 4 ? SO2_SET::sum_backward<float>(p) : SO2_SET::sum_backward<double>(p);
}

}  // namespace catmllm::so2
