// Tensors of PyTorch's stable ABI as the kernels take them: allocation, strided views, sums.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <vector>

#include "checks.h"
#include "params.h"

namespace vicinal {

using Tensors = std::vector<Tensor>;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, "vicinal: dtype must be float32, float64, float16 or bfloat16, got ",
                      x.scalar_type());
  }
}

inline ScalarType accumulator_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An uninitialized tensor. A large allocation is new memory, and its page faults take longer than
// filling it, unless pages are huge. The advice applies to the address range: after the tensor is
// freed, malloc may reuse the range, which then still has huge pages.
inline Tensor new_tensor(const Tensor& like, const Sizes& sizes, ScalarType type) {
  Tensor result = torch::stable::new_empty(like, sizes, type);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 1 << 21, kLarge = 1 << 23;
  const uintptr_t size = result.numel() * result.element_size();
  const uintptr_t data = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t first = (data + kPage - 1) / kPage * kPage;
  const uintptr_t last = (data + size) / kPage * kPage;
  if (size >= kLarge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return result;
}

inline Tensor new_tensor_like(const Tensor& x, ScalarType type) {
  return new_tensor(x, sizes_of(x), type);
}

// Returns x if its channels (the last axis) are contiguous, else a contiguous copy.
inline Tensor contiguous_channels(const char* name, const Tensor& x) {
  check_dims(name, x, 3);
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// A view of a tensor [rows, heads, width] with contiguous channels.
inline Rows rows_of(const Tensor& x) {
  return {x.data_ptr(), x.size(1), x.size(2), x.stride(0), x.stride(1), dtype_of(x)};
}

// A view of a contiguous tensor [..., heads, width] as [rows, heads, width].
inline Rows flattened_rows(const Tensor& x) {
  const int64_t heads = x.size(x.dim() - 2), width = x.size(x.dim() - 1);
  return {x.data_ptr(), heads, width, heads * width, width, dtype_of(x)};
}

// A view of a contiguous tensor [..., heads] as [rows, heads, 1].
inline Rows cell_rows(const Tensor& x) {
  const int64_t heads = x.size(x.dim() - 1);
  return {x.data_ptr(), heads, 1, heads, 1, dtype_of(x)};
}

// Partial sums: zeros [n_parts, *x.shape] in the accumulator dtype.
inline Tensor new_parts(const Tensor& x, int64_t n_parts) {
  Sizes sizes = sizes_of(x);
  sizes.insert(sizes.begin(), n_parts);
  return torch::stable::new_zeros(x, sizes, accumulator_dtype(x));
}

// The sum over the first axis of partial sums, in the dtype of `like`.
inline Tensor sum_parts(const Tensor& parts, const Tensor& like) {
  const int64_t axis = 0;
  const torch::headeronly::IntHeaderOnlyArrayRef axes(&axis, 1);
  return torch::stable::to(torch::stable::sum(parts, axes), like.scalar_type());
}

}  // namespace vicinal
