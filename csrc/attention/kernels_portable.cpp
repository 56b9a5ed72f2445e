// The kernels in what every machine has.
#include <cstdint>

#include "../so2/run.h"
#include "isa.h"

#define SO2_LEVEL 0
#define ATTENTION_SET portable
#define ATTENTION_FORWARD forward_portable
#define ATTENTION_BACKWARD backward_portable
#include "kernels.h"
