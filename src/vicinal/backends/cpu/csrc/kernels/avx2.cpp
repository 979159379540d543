// The kernels for x86 processors with AVX2.
#include "../kernel_table.h"

#ifdef VICINAL_X86
#define VICINAL_ISA avx2
#define VICINAL_BYTES 32
#define VICINAL_FEATURES "avx2,fma,bmi,bmi2,popcnt"
#include "kernels.h"
#endif
