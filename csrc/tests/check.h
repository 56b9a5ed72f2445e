// What the unit tests of the CPU kernels share.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../vector/level.h"

inline int failures = 0;

inline void check(bool condition, const std::string& what, int line) {
    if (condition) return;
    ++failures;
    std::printf("line %d: %s\n", line, what.c_str());
}
#define CHECK(condition, what) check(condition, std::string(#condition) + " for " + (what), __LINE__)

inline int report(const char* name) {
    std::printf("%s: %d failures\n", name, failures);
    return failures != 0;
}

// Makes the library run in one instruction set.
inline void use(const char* set) { setenv("CATMLLM_ISA", set, 1); }

// The instruction sets that this machine has, the portable one first.
inline std::vector<const char*> sets() {
    std::vector<const char*> found;
    for (const char* set : {"portable", "avx2", "avx512"}) {
        use(set);
        if (!std::strcmp(vector_isa(), set)) found.push_back(set);
    }
    return found;
}

// Normal numbers; the array ends where the next one is not, so that the sanitizer sees one step too far.
template <class T>
std::vector<T> normal(std::mt19937& random, std::size_t n, double scale = 1) {
    std::normal_distribution<double> draw(0, scale);
    std::vector<T> x(n);
    for (T& value : x) value = T(draw(random));
    return x;
}

// Largest difference of two results in units of the first one's largest value.
template <class T, class U>
double distance(const std::vector<T>& a, const std::vector<U>& b) {
    double worst = 0, scale = 1e-30;
    for (std::size_t i = 0; i < a.size(); ++i) {
        const double d = std::fabs(double(a[i]) - double(b[i]));
        worst = !(d <= worst) ? d : worst;  // a NaN is a difference
        scale = std::fmax(scale, std::fabs(double(a[i])));
    }
    return worst / scale;
}
