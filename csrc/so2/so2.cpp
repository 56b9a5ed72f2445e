#include "so2.h"

#include "table.h"

namespace catmllm::so2 {
namespace {

template <class P>
const char* wrong_in_any(const P& p) {
    if (p.dtype != 4 && p.dtype != 8) return "dtype must be 4 (float) or 8 (double)";
    if (p.lmax < 1 || p.lmax > SO2_MAX_LMAX || p.mmax < 0 || p.mmax > p.lmax)
        return "need 1 <= lmax <= 8 and 0 <= mmax <= lmax";
    if (p.nodes < 0 || p.edges < 0) return "a negative number of nodes or edges";
    return nullptr;
}

const char* wrong(const so2_sum& p) {
    if (const char* error = wrong_in_any(p)) return error;
    if (p.heads < 1 || p.value < 1) return "every width must be at least 1";
    const int rows = (p.lmax + 1) * (2 * p.mmax + 1) - p.mmax * (p.mmax + 1);
    if (p.rows != rows && p.rows != p.lmax + 1) return "values need every row of an edge, or those of m = 0";
    return nullptr;
}

const char* wrong(const so2_message& p) {
    if (const char* error = wrong_in_any(p)) return error;
    if (p.channels < 1 || p.hidden < 1 || p.heads < 1 || p.alpha < 1 || p.value < 1 || p.radial < 1)
        return "every width must be at least 1";
    if (!p.gate && (p.latitudes < 1 || p.longitudes < 1)) return "the sphere activation needs a grid";
    return nullptr;
}

}  // namespace
}  // namespace catmllm::so2

using namespace catmllm::so2;

const char* so2_forward(const so2_message* p) {
    const char* error = wrong(*p);
    return error ? error : chosen().forward(p);
}

const char* so2_backward(const so2_message* p) {
    const char* error = wrong(*p);
    return error ? error : chosen().backward(p);
}

const char* so2_sum_forward(const so2_sum* p) {
    const char* error = wrong(*p);
    return error ? error : chosen().sum_forward(p);
}

const char* so2_sum_backward(const so2_sum* p) {
    const char* error = wrong(*p);
    return error ? error : chosen().sum_backward(p);
}
