// The kernels for x86 processors with AVX-512.
#include "../kernel_table.h"

#ifdef VICINAL_X86
#define VICINAL_ISA avx512
#define VICINAL_BYTES 64
#define VICINAL_FEATURES "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi,bmi2,popcnt"
#include "kernels.h"
#endif
