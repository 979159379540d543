// The kernels of each instruction set, as ops.cpp calls them. Every set is compiled by itself, from
// a source file of its own in kernels/, so that compilers can run at the same time.
#pragma once

#include <cstdint>

#include "params.h"
#include "scheduling.h"

#if defined(__x86_64__) && defined(__GNUC__) && \
    !defined(VICINAL_BASELINE_ONLY)  // for builds with sanitizers, which take long
#define VICINAL_X86 1
#endif

namespace vicinal {

// Every thread calls an entry point with the same queue or schedule.
struct KernelTable {
  int64_t vector_bytes;
  void (*attention_forward)(const AttentionParams&, WorkQueue&);
  void (*attention_backward)(const AttentionParams&, BackwardSchedule&);
  void (*rotary)(Dtype, const RotaryParams&, WorkQueue&, bool forward);
  void (*sample)(const SamplingParams&, WorkQueue&, bool forward);
};

namespace baseline {
extern const KernelTable table;
}
#ifdef VICINAL_X86
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

}  // namespace vicinal
