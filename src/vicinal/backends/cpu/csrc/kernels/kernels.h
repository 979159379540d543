// All kernels, for one instruction set. ops.cpp includes this file once per instruction set, after
// it defines VICINAL_ISA (the namespace) and VICINAL_BYTES (the width of a SIMD register). For this
// reason the files below have no include guards, and each depends on those before it.

#include "simd.h"
#include "packing.h"
#include "gather_products.h"
#include "online_softmax.h"
#include "tile_neighbors.h"
#include "empty_cells.h"
#include "window_cells.h"
#include "attention.h"
#include "rotary.h"
#include "sampling.h"
