// All kernels, for one instruction set. The source file of each set includes this file, after it
// defines VICINAL_ISA (the namespace), VICINAL_BYTES (the width of a SIMD register) and, except for
// the baseline, VICINAL_FEATURES (of the processor). The files below are parts of this one: each
// depends on those before it.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "../buffer.h"
#include "../kernel_table.h"

// The functions below, down to POP, may use VICINAL_FEATURES. So they need no compiler flags, with
// which functions of the headers above would get them as well.
#ifdef VICINAL_FEATURES
#define VICINAL_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define VICINAL_PUSH_TARGET(features) \
  VICINAL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define VICINAL_POP_TARGET VICINAL_PRAGMA(clang attribute pop)
#else
#define VICINAL_PUSH_TARGET(features) \
  VICINAL_PRAGMA(GCC push_options) VICINAL_PRAGMA(GCC target(features))
#define VICINAL_POP_TARGET VICINAL_PRAGMA(GCC pop_options)
#endif
#else
#define VICINAL_PUSH_TARGET(features)
#define VICINAL_POP_TARGET
#endif

VICINAL_PUSH_TARGET(VICINAL_FEATURES)
#include "simd.h"
#include "packing.h"
#include "gather_products.h"
#include "attention/packed_tile.h"
#include "attention/online_softmax.h"
#include "attention/tile_neighbors.h"
#include "attention/empty_cells.h"
#include "attention/window_cells.h"
#include "attention/query_state.h"
#include "attention/tile_prefetches.h"
#include "attention/passes.h"
#include "rotary.h"
#include "sampling.h"
VICINAL_POP_TARGET

namespace vicinal::VICINAL_ISA {
constinit const KernelTable table{VICINAL_BYTES, attention_forward, attention_backward, rotary,
                                  sample};
}
