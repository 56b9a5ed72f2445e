// The kernels in what every machine has.
#include <cstdint>

#include "../so2/run.h"
#include "isa.h"

#define SO2_LEVEL 0
#define ROWS_SET portable
#define ROWS_TABLE portable_table
#include "kernels.h"
