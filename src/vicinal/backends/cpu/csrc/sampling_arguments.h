// The arguments of the sampling ops, forward and backward: checks them, and converts them to
// SamplingParams.
#pragma once

#include <bit>
#include <cstdint>

#include "checks.h"
#include "params.h"
#include "tensors.h"

namespace vicinal {

// See vicinal._index.sampling for the arguments.
struct SamplingArguments {
  SamplingArguments(const Tensor& table, const Tensor& locations, const Tensor& weights,
                    const Tensor& images, const Tensors& index, const Sizes& sizes,
                    const Sizes& periodic, bool has_background)
      : table(torch::stable::contiguous(table)),
        locations(torch::stable::contiguous(locations)),
        weights(torch::stable::contiguous(weights)),
        sizes_(sizes),
        periodic_(periodic) {
    check_dims("table", table, 3);
    check_dims("locations", locations, 5);
    SamplingParams& p = params;
    p.n_queries = locations.size(0), p.n_heads = locations.size(1);
    p.n_levels = locations.size(2), p.n_points = locations.size(3), p.n_axes = locations.size(4);
    p.width = table.size(2);
    check_tensor("table", table, {table.size(0), p.n_heads, p.width}, floating(table));
    check_tensor("locations", locations, sizes_of(locations), floating(locations));
    check_tensor("weights", weights, {p.n_queries, p.n_heads, p.n_levels, p.n_points},
                 table.scalar_type());
    p.images = int64_data("images", images, {p.n_queries});
    set_index(index);
    const int64_t n_empty = has_background ? p.n_images * p.n_levels : 0;
    STD_TORCH_CHECK(table.size(0) >= n_empty, "vicinal: table must have at least ", n_empty,
                    " rows, those of empty cells, got ", table.size(0));
    p.n_cells = table.size(0) - n_empty;
    p.has_background = has_background;
    p.dtype = dtype_of(table), p.place_dtype = dtype_of(locations);
    p.table = this->table.data_ptr();
    p.locations = this->locations.data_ptr();
    p.weights = this->weights.data_ptr();
  }

  SamplingParams params;
  const Tensor table, locations, weights;

 private:
  static ScalarType floating(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  void set_index(const Tensors& index) {
    SamplingParams& p = params;
    STD_TORCH_CHECK(index.size() == 5, "vicinal: index must have 5 tensors, got ", index.size());
    STD_TORCH_CHECK(p.n_axes >= 1 && p.n_axes <= 16,
                    "vicinal: locations must have 1 to 16 axes, got ", p.n_axes);
    const int64_t n_corners = int64_t(1) << p.n_axes;
    check_dims("index.origins", index[0], 2);
    check_dims("index.starts", index[2], 1);
    check_dims("index.keys", index[3], 1);
    p.n_images = index[0].size(0);
    STD_TORCH_CHECK(p.n_images >= 1 || p.n_queries == 0, "vicinal: queries need an image");
    p.origins = int64_data("index.origins", index[0], {p.n_images, p.n_levels});
    p.steps = int64_data("index.steps", index[1], {p.n_axes, p.n_levels});
    const int64_t buckets = index[2].size(0);
    STD_TORCH_CHECK(buckets >= 1 && std::has_single_bit(uint64_t(buckets)),
                    "vicinal: index.starts must have a power of two of rows, got ", buckets);
    p.bucket_bits = std::countr_zero(uint64_t(buckets));
    p.starts = int32_data("index.starts", index[2], {buckets});
    p.n_entries = index[3].size(0);
    p.keys = int64_data("index.keys", index[3], {p.n_entries});
    p.corners = int32_data("index.corners", index[4], {p.n_entries, n_corners});
    STD_TORCH_CHECK(int64_t(sizes_.size()) == p.n_levels * p.n_axes &&
                        int64_t(periodic_.size()) == p.n_axes,
                    "vicinal: expected ", p.n_levels * p.n_axes, " sizes and ", p.n_axes,
                    " periods, got ", sizes_.size(), " and ", periodic_.size());
    p.sizes = sizes_.data();
    p.periodic = periodic_.data();
  }

  const Sizes sizes_, periodic_;
};

}  // namespace vicinal
