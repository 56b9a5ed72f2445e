// Eight numbers at a time, by the vector unit that the machine has: functions of these types are compiled
// once for each instruction set (CATMLLM_CLONES), and what they call is inlined into them.
#pragma once

#include <cstdint>
#include <cstring>

// (The choice is made before the thread sanitizer is ready for it.)
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define CATMLLM_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CATMLLM_CLONES
#endif
#define CATMLLM_INLINE inline __attribute__((always_inline))

namespace catmllm::geometry {

constexpr int kLanes = 8;

typedef double Lanes __attribute__((vector_size(8 * kLanes)));
typedef std::int64_t LaneMask __attribute__((vector_size(8 * kLanes)));

CATMLLM_INLINE Lanes load(const double* p) {
    Lanes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
CATMLLM_INLINE void store(double* p, Lanes v) { std::memcpy(p, &v, sizeof v); }
CATMLLM_INLINE Lanes first_lanes(Lanes v, std::int64_t n, double other) {  // v in the first n lanes
    const LaneMask lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return lane < n ? v : Lanes{} + other;
}

}  // namespace catmllm::geometry
