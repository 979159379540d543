// Parameters that ops.cpp passes to the kernels: strided views of tensors, and scalars.
//
// Sizes in shape comments: N queries, nnz points, L levels, B images in the batch, H heads,
// d channels of a query or key, dv channels of a value, P position dimensions, S slices per query
// (the rows of all its windows), K cells of all its windows, C coordinates per row.
//
// The accumulator dtype is float64 for float64 inputs and float32 for all others.
#pragma once

#include <algorithm>
#include <cstdint>

// For functions that are fast, or have an effect at all, only when inlined into their caller.
#define VICINAL_INLINE __attribute__((always_inline))
// For long functions with many callers: a copy in each would double the time to compile.
#define VICINAL_NOINLINE __attribute__((noinline))

namespace vicinal {

constexpr int kMaxTile = 256;  // maximum number of queries in a tile

// The neighbors of every query, as slices of the points in sorted order. Query i has the neighbors
// order[starts[i, s]:stops[i, s]] for every s < n_slices.
struct NeighborSlices {
  const int32_t* traversal;         // [N], query ids in the order in which tiles process them
  const int32_t *starts, *stops;    // [N, S], positions in `order`
  const int32_t* order;             // [nnz], point ids sorted by level, image and cell
  int64_t n_queries, n_slices, n_points;

  // A start or stop clamped to a valid position; `index` is a flat index into [N, S].
  int64_t start(int64_t index) const { return std::clamp<int64_t>(starts[index], 0, n_points); }
  int64_t stop(int64_t index) const { return std::min<int64_t>(stops[index], n_points); }
};

// A row of a window: its first cell, counted from the column of the window's first cell.
struct WindowRow {
  int32_t start, width;
};

enum class Dtype { float32, float64, float16, bfloat16 };

// A strided view of a [rows, heads, width] tensor with contiguous channels (last stride 1).
struct Rows {
  void* data = nullptr;  // [rows, heads, width]
  int64_t heads = 0, width = 0, row_stride = 0, head_stride = 0;
  Dtype dtype = Dtype::float32;
};

struct DropoutParams {
  bool active = false;
  uint64_t seed = 0;
  uint32_t threshold = 0;           // drop where hash(seed, head, query, column) < threshold
  double keep_scale = 1;            // 1 / (1 - dropout_p)
  const int32_t* query_ids = nullptr;   // [N], what each query is counted as; null: its row
  const int32_t* column_ids = nullptr;  // [nnz + 1], likewise of each point, then of the first cell

  uint32_t query_id(int64_t query) const { return query_ids ? query_ids[query] : query; }
  // Of a point, any for the -1 of padding. Empty cells are numbered from that of nnz on.
  uint32_t column_of(int64_t point) const {
    return column_ids && point >= 0 ? column_ids[point] : point;
  }
};

// The rows of the windows, and where windows and points lie along the last axis.
struct WindowParams {
  int64_t n_levels = 0, n_cells = 0;       // L, K
  const int64_t* level_rows = nullptr;     // [L], rows of a window
  const WindowRow* rows = nullptr;         // [S]
  const int32_t* first_columns = nullptr;  // [N, L], last coordinate of each window's first cell
  const int32_t* point_columns = nullptr;  // [nnz], last coordinate of each point, as in `order`
};

// Calls body(row, column of its first cell, width, number of cells in the rows before) for each row
// of a query's windows.
template <typename Body>
VICINAL_INLINE inline void for_window_rows(const WindowParams& windows, int64_t query,
                                           const Body& body) {
  int64_t row = 0, n_cells = 0;
  for (int64_t level = 0; level < windows.n_levels; ++level) {
    const uint32_t column = windows.first_columns[query * windows.n_levels + level];
    for (const int64_t end = row + windows.level_rows[level]; row < end; ++row) {
      const WindowRow& cells = windows.rows[row];
      body(row, column + uint32_t(cells.start), int64_t(cells.width), n_cells);
      n_cells += cells.width;
    }
  }
}

// Keys and values of the cells that hold no point: see vicinal.attention.Background.
struct BackgroundParams {
  bool active = false;
  Rows query;  // [N * L, H, d]
  Rows key;    // [K, H, d]
  Rows value;  // [B * L, H, dv]
  int64_t n_images = 0;                  // B
  const int32_t* query_batch = nullptr;  // [N], image of each query
  // Backward only. Each chunk of tiles has its own partial sums, so that threads do not share any.
  Rows grad_query;        // [N * L, H, d]
  Rows grad_key_parts;    // [chunks * K, H, d], accumulator dtype
  Rows grad_value_parts;  // [chunks * B * L, H, dv], accumulator dtype
};

// A number for each cell of the windows, which is added to the logits of what the cell holds.
struct BiasParams {
  bool active = false;
  Rows bias;  // [K, H, 1]
  // Backward only, as the partial sums of the background.
  Rows grad_parts;  // [chunks * K, H, 1], accumulator dtype
};

struct AttentionParams {
  int64_t n_heads = 0, tile_queries = 0;  // tile_queries: queries per tile
  double scale = 1;
  NeighborSlices slices;
  const bool* query_mask = nullptr;  // [N], true: masked
  DropoutParams dropout;
  WindowParams windows;
  BackgroundParams background;
  BiasParams bias;
  Rows q;               // [N, H, d]
  Rows k;               // [nnz, H, d]
  Rows v;               // [nnz, H, dv]
  Rows out;             // [N, H, dv]
  void* lse = nullptr;  // [N, H], accumulator dtype
  // Backward only.
  const void* grad_lse = nullptr;  // [N, H], accumulator dtype
  Rows grad_out;                   // [N, H, dv]
  Rows grad_q;                     // [N, H, d]
  Rows grad_k;                     // [nnz, H, d], accumulator dtype
  Rows grad_v;                     // [nnz, H, dv], accumulator dtype
  int32_t* heads_written = nullptr;  // [nnz], heads below this have been written to grad_k, grad_v
};

// Rotates channel pairs by the angles coordinates @ frequencies.
struct RotaryParams {
  int64_t n_heads = 0, n_coordinates = 0;
  int64_t n_pairs = 0;                  // of all heads: H * d / 2
  const double* coordinates = nullptr;  // [n, C]
  const double* frequencies = nullptr;  // [C, n_pairs]
  Rows x, out;                          // [n, H, d]
  // Backward only.
  Rows grad_out, grad_x;                   // [n, H, d]
  double* grad_coordinates = nullptr;      // [n, C]; null: not needed
  double* grad_frequency_parts = nullptr;  // [chunks, C, n_pairs]
};

// See kernels/sampling.h, and vicinal._index.cell_hash.CellIndex for the hash table.
struct SamplingParams {
  int64_t n_queries = 0, n_heads = 0, n_levels = 0, n_points = 0, n_axes = 0;  // N, H, L, K, P
  int64_t width = 0;                                                          // d
  Dtype dtype = Dtype::float32, place_dtype = Dtype::float32;
  bool has_background = false;      // the table has rows of empty cells
  void* table = nullptr;            // [M (+ B * L), H, d]
  const void* locations = nullptr;  // [N, H, L, K, P], place_dtype
  const void* weights = nullptr;    // [N, H, L, K]
  const int64_t* images = nullptr;  // [N]
  void* out = nullptr;              // [N, H, d]
  // Backward only.
  void* grad_out = nullptr;  // [N, H, d]
  void *grad_table = nullptr, *grad_locations = nullptr, *grad_weights = nullptr;
  // The hash table.
  int64_t n_images = 0, n_cells = 0, n_entries = 0;  // B, M
  int bucket_bits = 0;                // the table has 2^bucket_bits buckets
  const int64_t* origins = nullptr;   // [B, L], the key of each level's first cell
  const int64_t* steps = nullptr;     // [P, L], from the key of a cell to that of the next
  const int32_t* starts = nullptr;    // [buckets], the first entry of each
  const int64_t* keys = nullptr;      // [entries], of the first corner
  const int32_t* corners = nullptr;   // [entries, 2^P], cells; M where a cell is empty
  const int64_t* sizes = nullptr;     // [L, P], of the levels, in cells
  const int64_t* periodic = nullptr;  // [P], 1 for axes along which the map repeats
};

}  // namespace vicinal
