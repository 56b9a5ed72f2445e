// The kernels in what every machine has.
#include "isa.h"
#include "run.h"
#include "sizes.h"

#define SO2_LEVEL 0
#define SO2_SET portable
#define SO2_FORWARD forward_portable
#define SO2_BACKWARD backward_portable
#define SO2_SUM_FORWARD sum_forward_portable
#define SO2_SUM_BACKWARD sum_backward_portable
#include "kernels.h"
