// The kernels for any processor.
#define VICINAL_ISA baseline
#define VICINAL_BYTES 16
#include "kernels.h"
