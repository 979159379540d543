// All kernels, for one instruction set: see vectors.h.

#include "vectors.h"
// Each builds on those before it.
#include "layout.h"
#include "products.h"
#include "softmax.h"
#include "neighbors.h"
#include "cells.h"
#include "tiles.h"
// On vectors alone.
#include "rotation.h"
