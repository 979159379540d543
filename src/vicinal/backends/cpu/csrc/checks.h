// Checks of the arguments of ops. No combination of shapes, dtypes and devices may pass that makes a
// kernel read or write outside a buffer.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace vicinal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline Sizes sizes_of(const Tensor& x) {
  Sizes sizes;
  for (int64_t axis = 0; axis < x.dim(); ++axis) sizes.push_back(x.size(axis));
  return sizes;
}

// For error messages, such as "Float [3, 4]".
inline std::string describe(const Sizes& sizes, ScalarType type) {
  std::string text = std::string(torch::headeronly::toString(type)) + " [";
  for (size_t axis = 0; axis < sizes.size(); ++axis)
    text += (axis ? ", " : "") + std::to_string(sizes[axis]);
  return text + "]";
}

inline void check_tensor(const char* name, const Tensor& x, const Sizes& sizes, ScalarType type) {
  STD_TORCH_CHECK(sizes_of(x) == sizes && x.scalar_type() == type && x.is_cpu(), "vicinal: ", name,
                  " must be ", describe(sizes, type), " on the CPU, got ",
                  describe(sizes_of(x), x.scalar_type()));
}

// The sizes are compared one by one: kernels compute addresses from them, so that a tensor of
// another shape must not pass, even if it has as many elements.
inline void check_contiguous(const char* name, const Tensor& x, const Sizes& sizes,
                             ScalarType type) {
  check_tensor(name, x, sizes, type);
  STD_TORCH_CHECK(x.is_contiguous(), "vicinal: ", name, " must be contiguous, got strides of a ",
                  describe(sizes, type));
}

// The data of an index tensor.
inline const int32_t* int32_data(const char* name, const Tensor& x, const Sizes& sizes) {
  check_contiguous(name, x, sizes, ScalarType::Int);
  return x.const_data_ptr<int32_t>();
}
inline const int64_t* int64_data(const char* name, const Tensor& x, const Sizes& sizes) {
  check_contiguous(name, x, sizes, ScalarType::Long);
  return x.const_data_ptr<int64_t>();
}

inline void check_dims(const char* name, const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == dims, "vicinal: ", name, " must have ", dims,
                  " dimensions on the CPU, got ", describe(sizes_of(x), x.scalar_type()));
}

inline void check_dropout(double rate) {
  STD_TORCH_CHECK(rate >= 0 && rate < 1, "vicinal: dropout_p must be in [0, 1), got ", rate);
}

// Checks that there is a level, that each has a row of its windows, and that all have n_rows.
inline void check_window_rows(const Sizes& rows, int64_t n_rows) {
  int64_t total = 0;
  for (int64_t count : rows) {
    STD_TORCH_CHECK(count >= 1 && count <= n_rows, "vicinal: slices must be at least 1 and at most ",
                    n_rows, ", the columns of plan.starts, got ", count);
    total += count;
  }
  STD_TORCH_CHECK(!rows.empty() && total == n_rows, "vicinal: plan.starts must have ", total,
                  " columns, one per row of the windows, got ", n_rows);
}

}  // namespace vicinal
