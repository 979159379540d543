// The CPU implementations of vicinal's ops, on PyTorch's stable ABI (2.10 and later): argument
// checks, allocation of results, the choice of an instruction set at run time, and parallelization
// over torch's threads. The kernels are in kernels/. Shape comments use the sizes of params.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "attention_arguments.h"
#include "checks.h"
#include "kernel_table.h"
#include "params.h"
#include "sampling_arguments.h"
#include "scheduling.h"
#include "slice_search.h"
#include "tensors.h"

namespace vicinal {
namespace {

// ------------------------------------------------------------------------ instruction sets

// The widest instruction set that the processor supports and ATEN_CPU_CAPABILITY (the environment
// variable of ATen's own kernels) allows.
const KernelTable& kernels() {
  static const KernelTable& table = []() -> const KernelTable& {
#ifdef VICINAL_X86
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string capability = variable ? variable : "avx512";
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && capability == "avx512") return avx512::table;
    if (avx2 && capability != "default") return avx2::table;
#endif
    return baseline::table;
  }();
  return table;
}

// ------------------------------------------------------------------------ threads

// Calls body on each of torch's threads, but on at most n_chunks threads.
template <typename Body>
void run_on_threads(int64_t n_chunks, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), n_chunks);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body();
  });
}

// Calls body(queue) on each thread. Dynamic scheduling balances chunks of unequal cost.
template <typename Body>
void run_queue(int64_t n_units, int64_t units_per_chunk, const Body& body) {
  WorkQueue queue(n_units, units_per_chunk);
  run_on_threads(queue.n_chunks, [&] { body(queue); });
}

// ------------------------------------------------------------------------ attention

std::tuple<Tensor, Tensor> neighborhood_attention(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> query_mask, std::optional<Tensor> seed,
    std::optional<Tensors> background, std::optional<Tensor> bias, Tensors plan, Sizes slices,
    double scale, double dropout_p) {
  AttentionArguments arguments(q, k, v, query_mask, seed, background.value_or(Tensors{}), bias,
                               plan, slices, scale, dropout_p);
  Tensor out = new_tensor(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, accumulator_dtype(q));
  arguments.params.out = rows_of(out);
  arguments.params.lse = lse.data_ptr();
  run_queue(arguments.n_tiles(), 1, [&](WorkQueue& queue) {
    kernels().attention_forward(arguments.params, queue);
  });
  return {out, lse};
}

// The gradient of an argument that does not require one: zero rows.
Tensor no_gradient(const Tensor& x) {
  return torch::stable::new_empty(x, {0, x.size(1), x.size(2)});
}

// Zeros the gradient rows of points that are no query's neighbor; grad: [nnz, H, width].
void zero_unwritten(const Tensor& grad, const std::vector<int32_t>& heads_written) {
  if (grad.numel() == 0) return;
  const int64_t row_bytes = grad.stride(0) * grad.element_size();
  char* const data = static_cast<char*>(grad.data_ptr());
  for (size_t point = 0; point < heads_written.size(); ++point)
    if (!heads_written[point]) std::memset(data + point * row_bytes, 0, row_bytes);
}

// Runs the backward kernel. Returns the gradients of the background, or none without a background,
// and that of the bias, without rows if there is none.
std::tuple<Tensors, Tensor> run_backward(AttentionArguments& arguments) {
  BackgroundParams& background = arguments.params.background;
  BiasParams& bias = arguments.params.bias;
  // Each chunk has its own partial sums, so their memory bounds the number of chunks. Those of a
  // bias are small; many chunks share the work more evenly.
  int64_t max_chunks = std::numeric_limits<int32_t>::max(), n_summed = 0;
  if (background.active) n_summed += arguments.background[1].numel();
  if (bias.active) n_summed += arguments.bias.numel();
  const int64_t most = background.active ? 32 : 512;
  if (n_summed) max_chunks = std::clamp<int64_t>((1 << 22) / (n_summed + 1), 4, most);
  BackwardSchedule schedule = arguments.schedule(max_chunks);
  Tensors grads, parts;
  if (background.active) {
    grads.push_back(torch::stable::empty_like(arguments.background[0]));
    background.grad_query = flattened_rows(grads[0]);
    for (int i = 1; i < 3; ++i)
      parts.push_back(new_parts(arguments.background[i], schedule.n_chunks));
    background.grad_key_parts = flattened_rows(parts[0]);
    background.grad_value_parts = flattened_rows(parts[1]);
  }
  Tensor bias_parts;
  if (bias.active) {
    bias_parts = new_parts(arguments.bias, schedule.n_chunks);
    bias.grad_parts = cell_rows(bias_parts);
  }
  if (torch::stable::get_num_threads() > 1) {
    run_on_threads(schedule.n_chunks, [&] { schedule.list_groups(); });
    schedule.find_predecessors();
  }
  run_on_threads(schedule.n_chunks,
                 [&] { kernels().attention_backward(arguments.params, schedule); });
  for (size_t i = 0; i < parts.size(); ++i)
    grads.push_back(sum_parts(parts[i], arguments.background[1 + i]));
  const Sizes no_rows{0, arguments.q.size(1)};
  return {grads, bias.active ? sum_parts(bias_parts, arguments.bias)
                             : torch::stable::new_empty(arguments.q, no_rows)};
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor> neighborhood_attention_backward(
    Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
    std::optional<Tensor> query_mask, std::optional<Tensor> seed, std::optional<Tensors> background,
    std::optional<Tensor> bias, Tensors plan, Sizes slices, double scale, double dropout_p,
    bool needs_queries, bool needs_points) {
  AttentionArguments arguments(q, k, v, query_mask, seed, background.value_or(Tensors{}), bias,
                               plan, slices, scale, dropout_p);
  grad_out = contiguous_channels("grad_out", grad_out);
  grad_lse = torch::stable::contiguous(grad_lse);
  const Sizes out_sizes{q.size(0), q.size(1), v.size(2)};
  const Sizes lse_sizes{q.size(0), q.size(1)};
  check_tensor("grad_out", grad_out, out_sizes, q.scalar_type());
  check_contiguous("out", out, out_sizes, q.scalar_type());
  check_contiguous("lse", lse, lse_sizes, accumulator_dtype(q));
  check_contiguous("grad_lse", grad_lse, lse_sizes, accumulator_dtype(q));
  Tensor grad_q = new_tensor_like(q, q.scalar_type());
  // Many tiles add to the gradients of a point, in the accumulator dtype.
  Tensor grad_k = new_tensor_like(k, accumulator_dtype(k));
  Tensor grad_v = new_tensor_like(v, accumulator_dtype(v));
  std::vector<int32_t> heads_written(k.size(0));
  AttentionParams& p = arguments.params;
  p.out = rows_of(out);
  p.grad_out = rows_of(grad_out);
  p.lse = lse.data_ptr();
  p.grad_lse = grad_lse.data_ptr();
  p.grad_q = rows_of(grad_q);
  p.grad_k = rows_of(grad_k);
  p.grad_v = rows_of(grad_v);
  p.heads_written = heads_written.data();
  auto [grad_background, grad_bias] = run_backward(arguments);
  // The kernel computes all gradients in one pass; those that are not needed are dropped.
  if (!needs_queries) {
    grad_q = no_gradient(q), grad_background.clear();
    grad_bias = torch::stable::new_empty(q, {0, q.size(1)});
  }
  if (!needs_points)
    return {grad_q, no_gradient(k), no_gradient(v), grad_background, grad_bias};
  for (const Tensor& grad : {grad_k, grad_v}) zero_unwritten(grad, heads_written);
  return {grad_q, torch::stable::to(grad_k, k.scalar_type()),
          torch::stable::to(grad_v, v.scalar_type()), grad_background, grad_bias};
}

// ------------------------------------------------------------------------ rotary encoding

// Rows per unit of work. The order of summation over rows depends on it.
constexpr int64_t kRowsPerChunk = 512;

struct RotaryArguments {
  // x: [n, H, d], the input or the output of the rotation.
  RotaryArguments(const Tensor& x, const Tensor& coordinates, const Tensor& frequencies) {
    check_dims("x", x, 3);
    check_dims("coordinates", coordinates, 2);
    const int64_t heads = x.size(1), pairs = x.size(2) / 2, axes = coordinates.size(1);
    STD_TORCH_CHECK(x.size(2) % 2 == 0 && axes >= 1,
                    "vicinal: x must have an even width and coordinates at least one column, got ",
                    x.size(2), " and ", axes);
    check_contiguous("coordinates", coordinates, {x.size(0), axes}, ScalarType::Double);
    check_contiguous("frequencies", frequencies, {axes, heads, pairs}, ScalarType::Double);
    params.n_heads = heads;
    params.n_pairs = heads * pairs;
    params.n_coordinates = axes;
    params.coordinates = coordinates.const_data_ptr<double>();
    params.frequencies = frequencies.const_data_ptr<double>();
  }

  void run(const Tensor& x, bool forward) const {
    run_queue(x.size(0), kRowsPerChunk, [&](WorkQueue& queue) {
      kernels().rotary(dtype_of(x), params, queue, forward);
    });
  }

  RotaryParams params;
};

Tensor rotate(Tensor x, Tensor coordinates, Tensor frequencies) {
  RotaryArguments arguments(x, coordinates, frequencies);
  const Tensor in = contiguous_channels("x", x);
  Tensor out = new_tensor_like(x, x.scalar_type());
  arguments.params.x = rows_of(in);
  arguments.params.out = rows_of(out);
  arguments.run(in, true);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> rotate_backward(Tensor grad_out, Tensor out, Tensor coordinates,
                                                   Tensor frequencies, bool needs_coordinates) {
  RotaryArguments arguments(out, coordinates, frequencies);
  grad_out = contiguous_channels("grad_out", grad_out);
  check_tensor("grad_out", grad_out, sizes_of(out), out.scalar_type());
  check_contiguous("out", out, sizes_of(out), out.scalar_type());
  const int64_t n_chunks = (out.size(0) + kRowsPerChunk - 1) / kRowsPerChunk;
  Tensor grad_x = new_tensor_like(out, out.scalar_type());
  const int64_t n_grads = needs_coordinates ? coordinates.size(0) : 0;
  Tensor grad_coordinates =
      new_tensor(coordinates, {n_grads, coordinates.size(1)}, ScalarType::Double);
  Tensor grad_frequency_parts = new_parts(frequencies, n_chunks);
  RotaryParams& p = arguments.params;
  p.out = rows_of(out);
  p.grad_out = rows_of(grad_out);
  p.grad_x = rows_of(grad_x);
  p.grad_coordinates = needs_coordinates ? grad_coordinates.mutable_data_ptr<double>() : nullptr;
  p.grad_frequency_parts = grad_frequency_parts.mutable_data_ptr<double>();
  arguments.run(out, false);
  return {grad_x, grad_coordinates, sum_parts(grad_frequency_parts, frequencies)};
}

// ------------------------------------------------------------------------ deformable sampling

Tensor sample(Tensor table, Tensor locations, Tensor weights, Tensor images, Tensors index,
              Sizes sizes, Sizes periodic, bool has_background) {
  SamplingArguments arguments(table, locations, weights, images, index, sizes, periodic,
                              has_background);
  SamplingParams& p = arguments.params;
  Tensor out = new_tensor(table, {p.n_queries, p.n_heads, p.width}, table.scalar_type());
  p.out = out.data_ptr();
  constexpr int64_t kQueriesPerChunk = 32;
  run_queue(p.n_queries, kQueriesPerChunk,
            [&](WorkQueue& queue) { kernels().sample(p, queue, true); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sample_backward(Tensor grad_out, Tensor table, Tensor locations,
                                                   Tensor weights, Tensor images, Tensors index,
                                                   Sizes sizes, Sizes periodic,
                                                   bool has_background) {
  SamplingArguments arguments(table, locations, weights, images, index, sizes, periodic,
                              has_background);
  SamplingParams& p = arguments.params;
  grad_out = torch::stable::contiguous(grad_out);
  check_contiguous("grad_out", grad_out, {p.n_queries, p.n_heads, p.width}, table.scalar_type());
  Tensor grad_table = torch::stable::new_zeros(table, sizes_of(table));
  Tensor grad_locations = new_tensor_like(locations, locations.scalar_type());
  Tensor grad_weights = new_tensor_like(weights, weights.scalar_type());
  p.grad_out = grad_out.data_ptr();
  p.grad_table = grad_table.data_ptr();
  p.grad_locations = grad_locations.data_ptr();
  p.grad_weights = grad_weights.data_ptr();
  run_queue(p.n_heads, 1, [&](WorkQueue& queue) { kernels().sample(p, queue, false); });
  return {grad_table, grad_locations, grad_weights};
}

// ------------------------------------------------------------------------ other ops

std::tuple<Tensor, Tensor> find_slices(Tensor sorted_keys, Tensor query_keys, Tensor traversal,
                                       Tensor level, Tensor first, Tensor width) {
  check_dims("query_keys", query_keys, 2);
  for (const Tensor* x : {&sorted_keys, &level}) check_dims("sorted_keys and level", *x, 1);
  SliceSearch s;
  s.n_levels = query_keys.size(0);
  s.n_queries = query_keys.size(1);
  s.n_rows = level.numel();
  s.n_keys = sorted_keys.numel();
  s.keys = int64_data("sorted_keys", sorted_keys, {s.n_keys});
  s.query_keys = int64_data("query_keys", query_keys, {s.n_levels, s.n_queries});
  s.traversal = int32_data("traversal", traversal, {s.n_queries});
  s.level = int64_data("level", level, {s.n_rows});
  s.first = int64_data("first", first, {s.n_rows});
  s.width = int64_data("width", width, {s.n_rows});
  for (int64_t row = 0; row < s.n_rows; ++row)
    STD_TORCH_CHECK(s.level[row] >= 0 && s.level[row] < s.n_levels, "vicinal: level[", row,
                    "] must be at least 0 and less than ", s.n_levels, ", got ", s.level[row]);
  Tensor starts = new_tensor(traversal, {s.n_queries, s.n_rows}, ScalarType::Int);
  Tensor stops = new_tensor(traversal, {s.n_queries, s.n_rows}, ScalarType::Int);
  s.starts = static_cast<int32_t*>(starts.data_ptr());
  s.stops = static_cast<int32_t*>(stops.data_ptr());
  const SortedKeyIndex index(s.keys, s.n_keys);
  torch::stable::parallel_for(0, s.n_queries, kRowsPerChunk, [&](int64_t begin, int64_t end) {
    search_slices(s, index, begin, end);
  });
  return {starts, stops};
}

// An uninitialized [n_rows, n_columns] tensor, in huge pages if large.
Tensor new_rows(Tensor like, int64_t n_rows, int64_t n_columns) {
  STD_TORCH_CHECK(n_rows >= 0 && n_columns >= 0, "vicinal: sizes must not be negative, got ",
                  n_rows, " and ", n_columns);
  return new_tensor(like, {n_rows, n_columns}, like.scalar_type());
}

// The width of the vectors of the instruction set in use.
int64_t vector_bytes() { return kernels().vector_bytes; }

}  // namespace
}  // namespace vicinal

// The schemas of `backends/ops.py` and `sampling_ops.py`, for programs without Python. The
// background is optional, not only possibly empty: packages of AOTInductor pass None for an empty
// list.
#define VICINAL_ATTENTION_ARGUMENTS                                                              \
  "Tensor q, Tensor k, Tensor v, Tensor? query_mask, Tensor? seed, Tensor[]? background, "       \
  "Tensor? bias, Tensor[] plan, int[] slices, float scale, float dropout_p"

#define VICINAL_SAMPLING_ARGUMENTS                                                               \
  "Tensor table, Tensor locations, Tensor weights, Tensor images, Tensor[] index, int[] sizes, " \
  "int[] periodic, bool has_background"

STABLE_TORCH_LIBRARY_FRAGMENT(vicinal, m) {
  m.def("neighborhood_attention(" VICINAL_ATTENTION_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("neighborhood_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor out, "
        "Tensor lse, " VICINAL_ATTENTION_ARGUMENTS ", bool needs_queries, bool needs_points) "
        "-> (Tensor, Tensor, Tensor, Tensor[], Tensor)");
  m.def("find_slices(Tensor sorted_keys, Tensor query_keys, Tensor traversal, Tensor level, "
        "Tensor first, Tensor width) -> (Tensor, Tensor)");
  m.def("rotate(Tensor x, Tensor coordinates, Tensor frequencies) -> Tensor");
  m.def("rotate_backward(Tensor grad_out, Tensor out, Tensor coordinates, Tensor frequencies, "
        "bool needs_coordinates) -> (Tensor, Tensor, Tensor)");
  m.def("sample(" VICINAL_SAMPLING_ARGUMENTS ") -> Tensor");
  m.def("sample_backward(Tensor grad_out, " VICINAL_SAMPLING_ARGUMENTS
        ") -> (Tensor, Tensor, Tensor)");
  m.def("vector_bytes() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(vicinal, CompositeExplicitAutograd, m) {
  m.impl("vector_bytes", TORCH_BOX(&vicinal::vector_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(vicinal, CPU, m) {
  m.impl("neighborhood_attention", TORCH_BOX(&vicinal::neighborhood_attention));
  m.impl("neighborhood_attention_backward", TORCH_BOX(&vicinal::neighborhood_attention_backward));
  m.impl("new_rows", TORCH_BOX(&vicinal::new_rows));
  m.impl("find_slices", TORCH_BOX(&vicinal::find_slices));
  m.impl("rotate", TORCH_BOX(&vicinal::rotate));
  m.impl("rotate_backward", TORCH_BOX(&vicinal::rotate_backward));
  m.impl("sample", TORCH_BOX(&vicinal::sample));
  m.impl("sample_backward", TORCH_BOX(&vicinal::sample_backward));
}
