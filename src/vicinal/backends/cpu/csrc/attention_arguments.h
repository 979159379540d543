// The arguments of the attention ops, forward and backward: checks them, and converts them to
// AttentionParams.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "params.h"
#include "scheduling.h"
#include "tensors.h"

namespace vicinal {

// Indices of the tensors in the ops' argument `plan`.
enum PlanTensor {
  kTraversal, kStarts, kStops, kOrder, kQueryBatch, kFirstColumns, kPointColumns, kWindowRows,
};
constexpr size_t kPlanTensors = 8;  // then column_ids, if any, or query_ids and column_ids

inline NeighborSlices slices_of(const Tensors& plan, int64_t n_queries, int64_t n_points) {
  const int64_t n_slices = plan[kStarts].size(1);
  return {int32_data("plan.traversal", plan[kTraversal], {n_queries}),
          int32_data("plan.starts", plan[kStarts], {n_queries, n_slices}),
          int32_data("plan.stops", plan[kStops], {n_queries, n_slices}),
          int32_data("plan.order", plan[kOrder], {n_points}),
          n_queries, n_slices, n_points};
}

// The arguments of the forward and the backward op: checks them, converts them to AttentionParams,
// and owns the memory that the params point to.
class AttentionArguments {
 public:
  AttentionArguments(const Tensor& q, const Tensor& k, const Tensor& v,
                     const std::optional<Tensor>& query_mask, const std::optional<Tensor>& seed,
                     const Tensors& background, const std::optional<Tensor>& bias,
                     const Tensors& plan, const Sizes& window_rows, double scale, double dropout_p)
      : q(contiguous_channels("q", q)),
        k(contiguous_channels("k", k)),
        v(contiguous_channels("v", v)),
        plan_(plan),
        window_rows_(window_rows) {
    const int64_t n = q.size(0), points = k.size(0);
    check_tensor("k", k, {points, q.size(1), q.size(2)}, q.scalar_type());
    check_tensor("v", v, {points, q.size(1), v.size(2)}, q.scalar_type());
    check_dropout(dropout_p);
    check_plan();
    params.n_heads = q.size(1);
    params.scale = scale;
    params.q = rows_of(this->q);
    params.k = rows_of(this->k);
    params.v = rows_of(this->v);
    params.slices = slices_of(plan, n, points);
    // Few queries make smaller tiles, for parallelism. The tile size must not depend on the number
    // of threads, because the order of summation depends on it.
    params.tile_queries = std::clamp<int64_t>(n / 64, 4, kMaxTile);
    if (query_mask) set_query_mask(*query_mask);
    if (seed) set_dropout(*seed, dropout_p);
    if (!background.empty() || bias) check_cells();
    if (!background.empty()) set_background(background);
    if (bias) set_bias(*bias);
  }

  int64_t n_tiles() const {
    return (params.slices.n_queries + params.tile_queries - 1) / params.tile_queries;
  }

  // A schedule of at most `max_chunks` chunks. The number of chunks must not depend on the number
  // of threads, because the order of summation depends on it.
  BackwardSchedule schedule(int64_t max_chunks) const {
    const int64_t tiles_per_chunk = std::max<int64_t>(1, (n_tiles() + max_chunks - 1) / max_chunks);
    return BackwardSchedule(params.slices, params.tile_queries, tiles_per_chunk);
  }

  AttentionParams params;
  const Tensor q, k, v;
  Tensors background;  // query [N, L, H, d], key [K, H, d], value [B, L, H, dv], or empty
  Tensor bias;         // [K, H], contiguous, if params.bias.active

 private:
  // Checks that the plan has one slice per row of the windows.
  void check_plan() {
    STD_TORCH_CHECK(plan_.size() >= kPlanTensors && plan_.size() <= kPlanTensors + 2,
                    "vicinal: plan must have ", kPlanTensors, " tensors, and up to two more with ",
                    "ids for dropout, got ", plan_.size());
    check_dims("plan.starts", plan_[kStarts], 2);
    const int64_t n = q.size(0), points = k.size(0), n_rows = plan_[kStarts].size(1);
    check_window_rows(window_rows_, n_rows);
    const int32_t* rows = int32_data("plan.window_rows", plan_[kWindowRows], {n_rows, 2});
    for (int64_t row = 0; row < n_rows; ++row) {
      rows_.push_back({rows[2 * row], rows[2 * row + 1]});
      STD_TORCH_CHECK(rows_[row].width >= 0, "vicinal: plan.window_rows must have widths of at ",
                      "least 0, got ", rows_[row].width);
      params.windows.n_cells += rows_[row].width;
    }
    WindowParams& w = params.windows;
    w.n_levels = window_rows_.size();
    w.level_rows = window_rows_.data();
    w.rows = rows_.data();
    w.first_columns = int32_data("plan.first_columns", plan_[kFirstColumns], {n, w.n_levels});
    w.point_columns = int32_data("plan.point_columns", plan_[kPointColumns], {points});
    params.background.query_batch = int32_data("plan.query_batch", plan_[kQueryBatch], {n});
    DropoutParams& d = params.dropout;
    if (plan_.size() > kPlanTensors)
      d.column_ids = int32_data("plan.column_ids", plan_[plan_.size() - 1], {points + 1});
    if (plan_.size() > kPlanTensors + 1)
      d.query_ids = int32_data("plan.query_ids", plan_[kPlanTensors], {n});
  }

  // Checks that 32-bit numbers count the cells of the windows, from 1 on.
  void check_cells() const {
    STD_TORCH_CHECK(params.windows.n_cells <= std::numeric_limits<int32_t>::max(),
                    "vicinal: plan.window_rows must have fewer than 2^31 cells in all, got ",
                    params.windows.n_cells);
  }

  void set_query_mask(const Tensor& query_mask) {
    query_mask_ = torch::stable::contiguous(query_mask);
    check_contiguous("query_mask", query_mask_, {q.size(0)}, ScalarType::Bool);
    params.query_mask = static_cast<const bool*>(query_mask_.data_ptr());
  }

  void set_dropout(const Tensor& seed, double dropout_p) {
    check_contiguous("seed", seed, {}, ScalarType::Long);
    params.dropout.active = true;
    params.dropout.seed = *seed.const_data_ptr<int64_t>();
    params.dropout.threshold = uint32_t(dropout_p * 4294967296.0);
    params.dropout.keep_scale = 1 / (1 - dropout_p);
  }

  void set_background(const Tensors& tensors) {
    STD_TORCH_CHECK(tensors.size() == 3, "vicinal: background must have 3 tensors, got ",
                    tensors.size());
    BackgroundParams& b = params.background;
    b.active = true;
    const WindowParams& w = params.windows;
    check_dims("background.value", tensors[2], 4);
    b.n_images = tensors[2].size(0);
    const int64_t n = q.size(0), d = q.size(2), dv = v.size(2);
    const int64_t heads = params.n_heads;
    b.query = add_background("background.query", tensors[0], {n, w.n_levels, heads, d});
    b.key = add_background("background.key", tensors[1], {w.n_cells, heads, d});
    b.value = add_background("background.value", tensors[2], {b.n_images, w.n_levels, heads, dv});
  }

  void set_bias(const Tensor& x) {
    check_tensor("bias", x, {params.windows.n_cells, params.n_heads}, q.scalar_type());
    bias = torch::stable::contiguous(x);
    params.bias.active = true;
    params.bias.bias = cell_rows(bias);
  }

  // Checks and stores a tensor [..., H, width] of the background, and returns it as rows.
  Rows add_background(const char* name, const Tensor& x, const Sizes& sizes) {
    check_tensor(name, x, sizes, q.scalar_type());
    background.push_back(torch::stable::contiguous(x));
    return flattened_rows(background.back());
  }

  const Tensors plan_;
  const Sizes window_rows_;      // [L], rows of a window
  std::vector<WindowRow> rows_;  // [S]
  Tensor query_mask_;            // [N]
};

}  // namespace vicinal
