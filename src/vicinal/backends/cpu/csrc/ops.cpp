// The CPU implementations of vicinal's ops, on PyTorch's stable ABI (2.10 and later): argument
// checks, allocation of results, the choice of an instruction set at run time, and parallelization
// over torch's threads. The kernels are in the headers. Shape comments use the sizes of params.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "checks.h"
#include "params.h"
#include "scheduling.h"
#include "slice_search.h"

#define VICINAL_ISA baseline
#define VICINAL_BYTES 16
#include "kernels.h"
#undef VICINAL_ISA
#undef VICINAL_BYTES

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VICINAL_X86 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,popcnt")
#define VICINAL_ISA avx2
#define VICINAL_BYTES 32
#include "kernels.h"
#undef VICINAL_ISA
#undef VICINAL_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi,bmi2,popcnt")
#define VICINAL_ISA avx512
#define VICINAL_BYTES 64
#include "kernels.h"
#undef VICINAL_ISA
#undef VICINAL_BYTES
#pragma GCC pop_options
#endif

namespace vicinal {
namespace {

using Tensors = std::vector<Tensor>;

// ------------------------------------------------------------------------ instruction sets

struct KernelTable {
  void (*attention_forward)(const AttentionParams&, WorkQueue&);
  void (*attention_backward)(const AttentionParams&, BackwardSchedule&);
  void (*rotary)(Dtype, const RotaryParams&, WorkQueue&, bool forward);
};

#define VICINAL_KERNEL_TABLE(isa) \
  KernelTable { isa::attention_forward, isa::attention_backward, isa::rotary }

// The widest instruction set that the processor supports and ATEN_CPU_CAPABILITY (the environment
// variable of ATen's own kernels) allows.
const KernelTable& kernels() {
  static const KernelTable table = [] {
#ifdef VICINAL_X86
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string capability = variable ? variable : "avx512";
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && capability == "avx512") return VICINAL_KERNEL_TABLE(avx512);
    if (avx2 && capability != "default") return VICINAL_KERNEL_TABLE(avx2);
#endif
    return VICINAL_KERNEL_TABLE(baseline);
  }();
  return table;
}

// ------------------------------------------------------------------------ tensors

Dtype dtype_of(const Tensor& x) {
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

ScalarType accumulator_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An uninitialized tensor. A large allocation is new memory, and its page faults take longer than
// filling it, unless pages are huge. The advice applies to the address range: after the tensor is
// freed, malloc may reuse the range, which then still has huge pages.
Tensor new_tensor(const Tensor& like, const Sizes& sizes, ScalarType type) {
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

Tensor new_tensor_like(const Tensor& x, ScalarType type) {
  return new_tensor(x, sizes_of(x), type);
}

// Returns x if its channels (the last axis) are contiguous, else a contiguous copy.
Tensor contiguous_channels(const char* name, const Tensor& x) {
  check_dims(name, x, 3);
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// A view of a tensor [rows, heads, width] with contiguous channels.
Rows rows_of(const Tensor& x) {
  return {x.data_ptr(), x.size(1), x.size(2), x.stride(0), x.stride(1), dtype_of(x)};
}

// A view of a contiguous tensor [..., heads, width] as [rows, heads, width].
Rows flattened_rows(const Tensor& x) {
  const int64_t heads = x.size(x.dim() - 2), width = x.size(x.dim() - 1);
  return {x.data_ptr(), heads, width, heads * width, width, dtype_of(x)};
}

// Partial sums: zeros [n_parts, *x.shape] in the accumulator dtype.
Tensor new_parts(const Tensor& x, int64_t n_parts) {
  Sizes sizes = sizes_of(x);
  sizes.insert(sizes.begin(), n_parts);
  return torch::stable::new_zeros(x, sizes, accumulator_dtype(x));
}

// The sum over the first axis of partial sums, in the dtype of `like`.
Tensor sum_parts(const Tensor& parts, const Tensor& like) {
  const int64_t axis = 0;
  const torch::headeronly::IntHeaderOnlyArrayRef axes(&axis, 1);
  return torch::stable::to(torch::stable::sum(parts, axes), like.scalar_type());
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

// Indices of the tensors in the ops' argument `plan`.
enum PlanTensor {
  kTraversal, kStarts, kStops, kOrder, kQueryBatch, kCenterColumns, kPointColumns,
  kCopyPoints,  // where there are copies
};
constexpr size_t kPlanTensors = 7;

NeighborSlices slices_of(const Tensors& plan, int64_t n_queries, int64_t n_points) {
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
                     const Tensors& background, const Tensors& plan, const Sizes& windows,
                     int64_t position_dim, double scale, double dropout_p)
      : q(contiguous_channels("q", q)),
        k(contiguous_channels("k", k)),
        v(contiguous_channels("v", v)),
        plan_(plan),
        windows_(windows) {
    const int64_t n = q.size(0), points = k.size(0);
    check_tensor("k", k, {points, q.size(1), q.size(2)}, q.scalar_type());
    check_tensor("v", v, {points, q.size(1), v.size(2)}, q.scalar_type());
    check_dropout(dropout_p);
    check_plan(position_dim);
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
    if (!background.empty()) set_background(background);
  }

  void forward() const {
    run_queue(n_tiles(), 1,
              [&](WorkQueue& queue) { kernels().attention_forward(params, queue); });
  }

  // A schedule of at most `max_chunks` chunks. The number of chunks must not depend on the number
  // of threads, because the order of summation depends on it.
  BackwardSchedule schedule(int64_t max_chunks) const {
    const int64_t tiles_per_chunk = std::max<int64_t>(1, (n_tiles() + max_chunks - 1) / max_chunks);
    return BackwardSchedule(params.slices, params.tile_queries, tiles_per_chunk,
                            torch::stable::get_num_threads());
  }

  void backward(BackwardSchedule& schedule) const {
    run_on_threads(schedule.n_chunks, [&] { kernels().attention_backward(params, schedule); });
  }

  AttentionParams params;
  const Tensor q, k, v;
  Tensors background;  // query [N, L, H, d], key [K, H, d], value [B, L, H, dv], or empty

 private:
  int64_t n_tiles() const {
    return (params.slices.n_queries + params.tile_queries - 1) / params.tile_queries;
  }

  // Checks that the plan has one slice per row of the windows.
  void check_plan(int64_t position_dim) {
    STD_TORCH_CHECK(plan_.size() == kPlanTensors || plan_.size() == kPlanTensors + 1,
                    "vicinal: plan must have ", kPlanTensors, " tensors, and one more with copies",
                    ", got ", plan_.size());
    check_dims("plan.starts", plan_[kStarts], 2);
    window_rows_ = count_window_rows(windows_, position_dim, plan_[kStarts].size(1));
    const int64_t n = q.size(0), points = k.size(0);
    int32_data("plan.query_batch", plan_[kQueryBatch], {n});
    int32_data("plan.center_columns", plan_[kCenterColumns], {n, int64_t(windows_.size())});
    int32_data("plan.point_columns", plan_[kPointColumns], {points});
  }

  void set_query_mask(const Tensor& query_mask) {
    query_mask_ = torch::stable::contiguous(query_mask);
    check_contiguous("query_mask", query_mask_, {q.size(0)}, ScalarType::Bool);
    params.query_mask = static_cast<const bool*>(query_mask_.data_ptr());
  }

  void set_dropout(const Tensor& seed, double dropout_p) {
    check_contiguous("seed", seed, {}, ScalarType::Long);
    const uint64_t bits = *seed.const_data_ptr<int64_t>();
    params.dropout.active = true;
    params.dropout.key = baseline::hash32(baseline::hash32(uint32_t(bits)) ^ uint32_t(bits >> 32));
    params.dropout.threshold = uint32_t(dropout_p * 4294967296.0);
    params.dropout.keep_scale = 1 / (1 - dropout_p);
    params.dropout.n_originals = k.size(0);
    if (plan_.size() > kPlanTensors) set_copies(plan_[kCopyPoints]);
  }

  void set_copies(const Tensor& copy_points) {
    check_dims("plan.copy_points", copy_points, 1);
    const int64_t n_copies = copy_points.size(0);
    params.dropout.copy_points = int32_data("plan.copy_points", copy_points, {n_copies});
    params.dropout.n_originals -= n_copies;
    STD_TORCH_CHECK(params.dropout.n_originals >= 0, "vicinal: plan.copy_points must be at most ",
                    k.size(0), " points, got ", n_copies);
  }

  void set_background(const Tensors& tensors) {
    STD_TORCH_CHECK(tensors.size() == 3, "vicinal: background must have 3 tensors, got ",
                    tensors.size());
    BackgroundParams& b = params.background;
    b.active = true;
    b.n_levels = windows_.size();
    for (int64_t level = 0; level < b.n_levels; ++level)
      b.n_cells += window_rows_[level] * windows_[level];
    check_dims("background.value", tensors[2], 4);
    b.n_images = tensors[2].size(0);
    const int64_t n = q.size(0), d = q.size(2), dv = v.size(2);
    const int64_t heads = params.n_heads;
    b.query = add_background("background.query", tensors[0], {n, b.n_levels, heads, d});
    b.key = add_background("background.key", tensors[1], {b.n_cells, heads, d});
    b.value = add_background("background.value", tensors[2], {b.n_images, b.n_levels, heads, dv});
    b.windows = windows_.data();
    b.window_rows = window_rows_.data();
    b.query_batch = plan_[kQueryBatch].const_data_ptr<int32_t>();
    b.center_columns = plan_[kCenterColumns].const_data_ptr<int32_t>();
    b.point_columns = plan_[kPointColumns].const_data_ptr<int32_t>();
  }

  // Checks and stores a tensor [..., H, width] of the background, and returns it as rows.
  Rows add_background(const char* name, const Tensor& x, const Sizes& sizes) {
    check_tensor(name, x, sizes, q.scalar_type());
    background.push_back(torch::stable::contiguous(x));
    return flattened_rows(background.back());
  }

  const Tensors plan_;
  const Sizes windows_;  // [L]
  Sizes window_rows_;    // [L]
  Tensor query_mask_;    // [N]
};

std::tuple<Tensor, Tensor> neighborhood_attention(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> query_mask, std::optional<Tensor> seed,
    Tensors background, Tensors plan, Sizes windows, int64_t position_dim, double scale,
    double dropout_p) {
  AttentionArguments arguments(q, k, v, query_mask, seed, background, plan, windows, position_dim,
                               scale, dropout_p);
  Tensor out = new_tensor(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, accumulator_dtype(q));
  arguments.params.out = rows_of(out);
  arguments.params.lse = lse.data_ptr();
  arguments.forward();
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

// Runs the backward kernel. Returns the gradients of the background, or none without a background.
Tensors run_backward(AttentionArguments& arguments) {
  BackgroundParams& b = arguments.params.background;
  if (!b.active) {
    BackwardSchedule schedule = arguments.schedule(std::numeric_limits<int32_t>::max());
    arguments.backward(schedule);
    return {};
  }
  const Tensor &query = arguments.background[0], &key = arguments.background[1],
               &value = arguments.background[2];
  // Each chunk has its own partial sums, so their memory bounds the number of chunks.
  const int64_t max_chunks = std::clamp<int64_t>((1 << 24) / (key.numel() + 1), 4, 32);
  BackwardSchedule schedule = arguments.schedule(max_chunks);
  Tensor grad_query = torch::stable::empty_like(query);
  Tensor grad_key_parts = new_parts(key, schedule.n_chunks);
  Tensor grad_value_parts = new_parts(value, schedule.n_chunks);
  b.grad_query = flattened_rows(grad_query);
  b.grad_key_parts = flattened_rows(grad_key_parts);
  b.grad_value_parts = flattened_rows(grad_value_parts);
  arguments.backward(schedule);
  return {grad_query, sum_parts(grad_key_parts, key), sum_parts(grad_value_parts, value)};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> neighborhood_attention_backward(
    Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
    std::optional<Tensor> query_mask, std::optional<Tensor> seed, Tensors background, Tensors plan,
    Sizes windows, int64_t position_dim, double scale, double dropout_p, bool needs_queries,
    bool needs_points) {
  AttentionArguments arguments(q, k, v, query_mask, seed, background, plan, windows, position_dim,
                               scale, dropout_p);
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
  Tensors grad_background = run_backward(arguments);
  // The kernel computes all gradients in one pass; those that are not needed are dropped.
  if (!needs_queries) grad_q = no_gradient(q), grad_background.clear();
  if (!needs_points) return {grad_q, no_gradient(k), no_gradient(v), grad_background};
  for (const Tensor& grad : {grad_k, grad_v}) zero_unwritten(grad, heads_written);
  return {grad_q, torch::stable::to(grad_k, k.scalar_type()),
          torch::stable::to(grad_v, v.scalar_type()), grad_background};
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
                                                   Tensor frequencies) {
  RotaryArguments arguments(out, coordinates, frequencies);
  grad_out = contiguous_channels("grad_out", grad_out);
  check_tensor("grad_out", grad_out, sizes_of(out), out.scalar_type());
  check_contiguous("out", out, sizes_of(out), out.scalar_type());
  const int64_t n_chunks = (out.size(0) + kRowsPerChunk - 1) / kRowsPerChunk;
  Tensor grad_x = new_tensor_like(out, out.scalar_type());
  Tensor grad_coordinates = torch::stable::empty_like(coordinates);
  Tensor grad_frequency_parts = new_parts(frequencies, n_chunks);
  RotaryParams& p = arguments.params;
  p.out = rows_of(out);
  p.grad_out = rows_of(grad_out);
  p.grad_x = rows_of(grad_x);
  p.grad_coordinates = grad_coordinates.mutable_data_ptr<double>();
  p.grad_frequency_parts = grad_frequency_parts.mutable_data_ptr<double>();
  arguments.run(out, false);
  return {grad_x, grad_coordinates, sum_parts(grad_frequency_parts, frequencies)};
}

// ------------------------------------------------------------------------ other ops

std::tuple<Tensor, Tensor> find_slices(Tensor sorted_keys, Tensor centers, Tensor traversal,
                                       Tensor level, Tensor offset, Tensor radius) {
  check_dims("centers", centers, 2);
  for (const Tensor* x : {&sorted_keys, &level}) check_dims("sorted_keys and level", *x, 1);
  SliceSearch s;
  s.n_levels = centers.size(0);
  s.n_queries = centers.size(1);
  s.n_rows = level.numel();
  s.n_keys = sorted_keys.numel();
  s.keys = int64_data("sorted_keys", sorted_keys, {s.n_keys});
  s.centers = int64_data("centers", centers, {s.n_levels, s.n_queries});
  s.traversal = int32_data("traversal", traversal, {s.n_queries});
  s.level = int64_data("level", level, {s.n_rows});
  s.offset = int64_data("offset", offset, {s.n_rows});
  s.radius = int64_data("radius", radius, {s.n_rows});
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

}  // namespace
}  // namespace vicinal

STABLE_TORCH_LIBRARY_IMPL(vicinal, CPU, m) {
  m.impl("neighborhood_attention", TORCH_BOX(&vicinal::neighborhood_attention));
  m.impl("neighborhood_attention_backward", TORCH_BOX(&vicinal::neighborhood_attention_backward));
  m.impl("new_rows", TORCH_BOX(&vicinal::new_rows));
  m.impl("find_slices", TORCH_BOX(&vicinal::find_slices));
  m.impl("rotate", TORCH_BOX(&vicinal::rotate));
  m.impl("rotate_backward", TORCH_BOX(&vicinal::rotate_backward));
}
