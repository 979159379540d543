// All kernels, for one instruction set: see cpu_vectors.h.

#include "cpu_vectors.h"
// Each builds on those before it.
#include "cpu_layout.h"
#include "cpu_products.h"
#include "cpu_softmax.h"
#include "cpu_neighbors.h"
#include "cpu_cells.h"
#include "cpu_tiles.h"
// On vectors alone.
#include "cpu_rotation.h"
