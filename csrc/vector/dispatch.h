// How a library has each of its functions once for every instruction set.
//
// Its `table.h` has a struct Table of pointers to its functions and VECTOR_SETS(Table), inside its namespace.
// Its `kernels.h` defines `const Table table` in the namespace VECTOR_SET, between begin.h and end.h of this
// folder. The build compiles avx512.cpp, avx2.cpp and portable.cpp of this folder with that file as
// VECTOR_KERNELS. chosen() is the table of the set that this machine is to run.
#pragma once

#include "level.h"

#ifdef VECTOR_X86
#define VECTOR_SETS(Table)                                             \
    namespace avx512 {                                                 \
    extern const Table table;                                          \
    }                                                                  \
    namespace avx2 {                                                   \
    extern const Table table;                                          \
    }                                                                  \
    namespace portable {                                               \
    extern const Table table;                                          \
    }                                                                  \
    inline const Table& chosen() {                                     \
        const vector::Level level = vector::level();                   \
        if (level == vector::kAvx512) return avx512::table;            \
        return level == vector::kAvx2 ? avx2::table : portable::table; \
    }
#else
#define VECTOR_SETS(Table)    \
    namespace portable {      \
    extern const Table table; \
    }                         \
    inline const Table& chosen() { return portable::table; }
#endif
