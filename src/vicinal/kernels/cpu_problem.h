// What the torch side of the CPU back end (cpu.cpp) and its kernels (cpu_tiles.h) share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vicinal {

// One direction of a plan: row i sees order[starts[i, r]:stops[i, r]] for every r < slices.
struct Slices {
  const int32_t *visits, *starts, *stops, *order;
  int64_t rows, slices, length;
  int64_t targets;  // what order's entries must stay below
};

// A [rows, heads, width] tensor whose channels stand side by side.
struct Rows {
  void* data = nullptr;
  int64_t row_stride = 0, head_stride = 0, width = 0;
};

struct Dropout {
  bool active = false;
  uint32_t key = 0, threshold = 0;
  double keep_scale = 1;
};

// The empty cells: see vicinal.attention.Background.
struct Background {
  bool active = false;
  Rows query;      // [N * L, H, d]
  Rows key;        // [K, H, d]
  Rows value;      // [B * L, H, dv]
  int64_t images = 0, levels = 0, slots = 0;
  const int64_t* windows = nullptr;      // [L], widths
  const int64_t* level_rows = nullptr;   // [L], window rows, w ** (P - 1)
  const int32_t *query_batch = nullptr, *center_columns = nullptr, *point_columns = nullptr;
  // Backward only. Partial sums are per work item, so that threads share none of them.
  Rows grad_query;                                            // like query
  void *grad_key_parts = nullptr, *grad_value_parts = nullptr;  // [items, K | B * L, H, d | dv]
};

struct Problem {
  int64_t heads = 0;
  double scale = 1;
  Slices queries, points;
  const bool* query_mask = nullptr;
  Dropout dropout;
  Background background;
  Rows q, k, v, out;
  void *lse = nullptr, *delta = nullptr;  // [N, H] in the type of the sums
  const void* grad_lse = nullptr;
  Rows grad_out, grad_q, grad_k, grad_v;
};

// Rows turned by angles coordinates @ frequencies; coordinates and frequencies are in the type of
// the sums, and so are the gradients of both.
struct Rotation {
  int64_t heads = 0, pairs = 0, coordinates_per_row = 0;  // pairs in all heads together
  const void *coordinates = nullptr, *frequencies = nullptr;  // [n, C], [C, pairs]
  Rows x, out;
  Rows grad_out, grad_x;
  void *grad_coordinates = nullptr, *grad_frequency_parts = nullptr;  // [n, C], [items, C, pairs]
};

enum class Pass { forward, backward_queries, backward_points };
enum class Storage { float32, float64, float16, bfloat16 };

// Threads take items one by one until none is left; an item is a run of tiles (or of rows).
struct Work {
  Work(int64_t tiles, int64_t tiles_per_item)
      : tiles(tiles), tiles_per_item(tiles_per_item < 1 ? 1 : tiles_per_item) {}

  const int64_t tiles, tiles_per_item;
  int64_t next = 0;

  int64_t items() const { return (tiles + tiles_per_item - 1) / tiles_per_item; }
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

}  // namespace vicinal
