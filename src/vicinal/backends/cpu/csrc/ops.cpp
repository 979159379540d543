// The torch side of the CPU back end: reads the op's arguments, picks the kernels built for this
// processor, and shares the tiles out over torch's threads. PyTorch's stable ABI, 2.10 on.

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

#include "problem.h"
#include "search.h"

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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

struct Kernels {
  void (*attend)(const Problem&, Work&);
  void (*attend_backward)(const Problem&, Schedule&);
  void (*rotate)(Storage, const Rotation&, Work&, bool forward);
};

// The widest the processor has, or what ATen's own ATEN_CPU_CAPABILITY asks for.
const Kernels& kernels() {
  static const Kernels chosen = [] {
#ifdef VICINAL_X86
    const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string capability = wish ? wish : "avx512";
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && capability == "avx512")
      return Kernels{avx512::attend, avx512::attend_backward, avx512::rotate};
    if (avx2 && capability != "default")
      return Kernels{avx2::attend, avx2::attend_backward, avx2::rotate};
#endif
    return Kernels{baseline::attend, baseline::attend_backward, baseline::rotate};
  }();
  return chosen;
}

Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Storage::float32;
    case ScalarType::Double: return Storage::float64;
    case ScalarType::Half: return Storage::float16;
    case ScalarType::BFloat16: return Storage::bfloat16;
    default: STD_TORCH_CHECK(false, "vicinal: expected float32, float64, float16 or bfloat16");
  }
}

ScalarType sum_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An uninitialised tensor. A large one is fresh memory, which the system hands out page by page as
// it is touched: that takes longer than to fill it, unless pages are large. (The advice is about
// addresses. What malloc keeps of them for others has large pages, then, which does no harm.)
Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  Tensor made = torch::stable::new_empty(like, sizes, type);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 1 << 21, kLarge = 1 << 23;
  const uintptr_t size = made.numel() * made.element_size();
  const uintptr_t data = reinterpret_cast<uintptr_t>(made.data_ptr());
  const uintptr_t first = (data + kPage - 1) / kPage * kPage;
  const uintptr_t last = (data + size) / kPage * kPage;
  if (size >= kLarge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return made;
}

Tensor new_rows(Tensor like, int64_t n_rows, int64_t n_columns) {
  return new_tensor(like, {n_rows, n_columns}, like.scalar_type());
}

// A contiguous tensor's rows, or a view's whose channels stand side by side; others are copied.
Tensor side_by_side(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 3, "vicinal: expected a tensor of 3 dimensions");
  return x.size(2) <= 1 || x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

Rows rows_of(const Tensor& x) {
  return {x.data_ptr(), x.size(1), x.size(2), x.stride(0), x.stride(1), storage_of(x)};
}

// A contiguous tensor of more dimensions as [rows, heads, width].
Rows folded_rows(const Tensor& x) {
  const int64_t heads = x.size(x.dim() - 2), width = x.size(x.dim() - 1);
  return {x.data_ptr(), heads, width, heads * width, width, storage_of(x)};
}

const int32_t* indices(const Tensor& x, int64_t numel) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int && x.is_contiguous() && x.numel() == numel,
                  "vicinal: the plan's tensors must be contiguous int32 of the sizes it was made with");
  return x.const_data_ptr<int32_t>();
}

Slices slices_of(const Tensors& plan, int64_t queries, int64_t points) {
  const int64_t slices = plan[1].size(1);
  return {indices(plan[0], queries), indices(plan[1], queries * slices),
          indices(plan[2], queries * slices), indices(plan[3], points),
          queries, slices, points};
}

// Calls body on each of torch's threads, or on fewer if there are only so many items.
template <typename Body>
void on_threads(int64_t items, const Body& body) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), items);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) body();
  });
}

// Calls body(work) on each thread; work is taken as the threads come to it, which evens out items
// of different cost.
template <typename Body>
void share_out(int64_t tiles, int64_t tiles_per_item, const Body& body) {
  Work work(tiles, tiles_per_item);
  on_threads(work.items(), [&] { body(work); });
}

// The arguments of both ops, checked, with what must outlive the problem made of them.
class Arguments {
 public:
  Arguments(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& query_mask,
            const std::optional<Tensor>& seed, const Tensors& background, const Tensors& plan,
            const std::vector<int64_t>& windows, int64_t position_dim, double scale, double dropout_p)
      : q(side_by_side(q)), k(side_by_side(k)), v(side_by_side(v)), plan_(plan), windows_(windows) {
    const int64_t n = q.size(0), points = k.size(0);
    STD_TORCH_CHECK(plan.size() == 7, "vicinal: a plan has 7 tensors");
    STD_TORCH_CHECK(q.size(1) == k.size(1) && q.size(1) == v.size(1) && q.size(2) == k.size(2) &&
                        v.size(0) == points && q.scalar_type() == k.scalar_type() &&
                        q.scalar_type() == v.scalar_type(),
                    "vicinal: q, k and v do not fit each other");
    int64_t rows = 0;
    for (int64_t window : windows) {
      level_rows_.push_back(1);
      for (int64_t axis = 1; axis < position_dim; ++axis) level_rows_.back() *= window;
      rows += level_rows_.back();
    }
    STD_TORCH_CHECK(plan[1].dim() == 2 && plan[1].size(1) == rows,
                    "vicinal: the plan's slices do not fit the windows");
    problem.heads = q.size(1);
    problem.scale = scale;
    problem.q = rows_of(this->q);
    problem.k = rows_of(this->k);
    problem.v = rows_of(this->v);
    problem.queries = slices_of(plan, n, points);
    // A few queries are spread over more tiles, for the threads to share. How large tiles are must
    // not depend on the number of threads, or the order of sums would.
    problem.tile_queries = std::clamp<int64_t>(n / 64, 4, kMaxTile);
    if (query_mask) {
      mask_ = torch::stable::contiguous(*query_mask);
      STD_TORCH_CHECK(mask_.scalar_type() == ScalarType::Bool && mask_.numel() == n,
                      "vicinal: query_mask must be bool [N]");
      problem.query_mask = static_cast<const bool*>(mask_.data_ptr());
    }
    if (seed) set_dropout(*seed, dropout_p);
    if (!background.empty()) set_background(background);
  }

  void attend() const {
    share_out(tiles(), 1, [&](Work& work) { kernels().attend(problem, work); });
  }

  // At most `most_chunks`. How many must not depend on the number of threads, or the order of the
  // sums would.
  Schedule schedule(int64_t most_chunks) const {
    const int64_t tiles_per_chunk = std::max<int64_t>(1, (tiles() + most_chunks - 1) / most_chunks);
    return Schedule(problem.queries, problem.tile_queries, tiles_per_chunk,
                    torch::stable::get_num_threads());
  }

  void attend_backward(Schedule& schedule) const {
    on_threads(schedule.chunks, [&] { kernels().attend_backward(problem, schedule); });
  }

  Problem problem;
  const Tensor q, k, v;
  Tensors background;  // query, key, value, contiguous; or none

 private:
  int64_t tiles() const {
    return (problem.queries.rows + problem.tile_queries - 1) / problem.tile_queries;
  }

  void set_dropout(const Tensor& seed, double rate) {
    STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1,
                    "vicinal: seed must be one int64");
    const uint64_t bits = *seed.const_data_ptr<int64_t>();
    problem.dropout.active = true;
    problem.dropout.key = baseline::mix(baseline::mix(uint32_t(bits)) ^ uint32_t(bits >> 32));
    problem.dropout.threshold = uint32_t(rate * 4294967296.0);
    problem.dropout.keep_scale = 1 / (1 - rate);
  }

  void set_background(const Tensors& given) {
    Background& b = problem.background;
    STD_TORCH_CHECK(given.size() == 3, "vicinal: a background has 3 tensors");
    for (const Tensor& x : given) {
      STD_TORCH_CHECK(x.dim() >= 3 && x.scalar_type() == q.scalar_type(),
                      "vicinal: the background does not have the dtype of q");
      background.push_back(torch::stable::contiguous(x));
    }
    b.active = true;
    b.levels = windows_.size();
    for (int64_t level = 0; level < b.levels; ++level) b.slots += level_rows_[level] * windows_[level];
    const int64_t n = q.size(0), points = k.size(0), heads = problem.heads;
    b.images = background[2].size(0);
    STD_TORCH_CHECK(background[0].numel() == n * b.levels * heads * q.size(2) &&
                        background[1].numel() == b.slots * heads * q.size(2) &&
                        background[2].numel() == b.images * b.levels * heads * v.size(2),
                    "vicinal: the background does not fit q, v and the windows");
    b.query = folded_rows(background[0]);
    b.key = folded_rows(background[1]);
    b.value = folded_rows(background[2]);
    b.windows = windows_.data();
    b.level_rows = level_rows_.data();
    b.query_batch = indices(plan_[4], n);
    b.center_columns = indices(plan_[5], n * b.levels);
    b.point_columns = indices(plan_[6], points);
  }

  const Tensors plan_;
  const std::vector<int64_t> windows_;
  std::vector<int64_t> level_rows_;
  Tensor mask_;
};

std::tuple<Tensor, Tensor> forward(
    Tensor q, Tensor k, Tensor v, std::optional<Tensor> query_mask, std::optional<Tensor> seed,
    Tensors background, Tensors plan, std::vector<int64_t> windows, int64_t position_dim,
    double scale, double dropout_p) {
  Arguments arguments(q, k, v, query_mask, seed, background, plan, windows, position_dim, scale,
                      dropout_p);
  Tensor out = new_tensor(q, {q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, sum_type(q));
  arguments.problem.out = rows_of(out);
  arguments.problem.lse = lse.data_ptr();
  arguments.attend();
  return {out, lse};
}

Tensor like_sums(const Tensor& x) {
  return new_tensor(x, {x.size(0), x.size(1), x.size(2)}, sum_type(x));
}

Tensor no_rows(const Tensor& x) {
  return torch::stable::new_empty(x, {0, x.size(1), x.size(2)});
}

// Points that no query sees have no gradient.
void clear_untouched(const Tensor& grad, const std::vector<int32_t>& touched) {
  if (grad.numel() == 0) return;
  const int64_t size = grad.stride(0) * grad.element_size();
  for (size_t point = 0; point < touched.size(); ++point)
    if (!touched[point]) std::memset(static_cast<char*>(grad.data_ptr()) + point * size, 0, size);
}

// Zeros like x, once for each of the items, in the type of the sums.
Tensor zero_parts(const Tensor& x, int64_t items) {
  std::vector<int64_t> sizes{items};
  for (int64_t axis = 0; axis < x.dim(); ++axis) sizes.push_back(x.size(axis));
  return torch::stable::new_zeros(x, sizes, sum_type(x));
}

// The sum over the items, in the type of the background.
Tensor total(const Tensor& parts, const Tensor& like) {
  const int64_t axis = 0;
  return torch::stable::to(torch::stable::sum(parts, torch::headeronly::IntHeaderOnlyArrayRef(&axis, 1)),
                           like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensors> backward(
    Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v,
    std::optional<Tensor> query_mask, std::optional<Tensor> seed, Tensors background, Tensors plan,
    std::vector<int64_t> windows, int64_t position_dim, double scale, double dropout_p,
    bool needs_queries, bool needs_points) {
  Arguments arguments(q, k, v, query_mask, seed, background, plan, windows, position_dim, scale,
                      dropout_p);
  Problem& p = arguments.problem;
  grad_out = side_by_side(grad_out);
  grad_lse = torch::stable::contiguous(grad_lse);
  const int64_t n = q.size(0), heads = q.size(1);
  STD_TORCH_CHECK(out.is_contiguous() && lse.is_contiguous() && out.dim() == 3 &&
                      out.numel() == n * heads * v.size(2) && lse.numel() == n * heads &&
                      grad_lse.numel() == lse.numel() && grad_out.size(0) == n &&
                      grad_out.size(1) == heads && grad_out.size(2) == v.size(2) &&
                      out.scalar_type() == q.scalar_type() &&
                      grad_out.scalar_type() == q.scalar_type() &&
                      lse.scalar_type() == sum_type(q) && grad_lse.scalar_type() == sum_type(q),
                  "vicinal: out, lse and their gradients do not fit q and v");
  Tensor grad_q = new_tensor(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  // Points collect their shares from many tiles, and do so in the type of the sums.
  Tensor grad_k = like_sums(k), grad_v = like_sums(v);
  std::vector<int32_t> touched(k.size(0));
  p.out = rows_of(out);
  p.grad_out = rows_of(grad_out);
  p.lse = lse.data_ptr();
  p.grad_lse = grad_lse.data_ptr();
  p.grad_q = rows_of(grad_q);
  p.grad_k = rows_of(grad_k);
  p.grad_v = rows_of(grad_v);
  p.touched = touched.data();

  Tensors grads;
  if (!p.background.active) {
    Schedule schedule = arguments.schedule(std::numeric_limits<int32_t>::max());
    arguments.attend_backward(schedule);
  } else {
    const Tensors& given = arguments.background;
    Schedule schedule = arguments.schedule(std::clamp<int64_t>((1 << 24) / (given[1].numel() + 1), 4, 32));
    Tensor query = torch::stable::empty_like(given[0]);
    Tensor key = zero_parts(given[1], schedule.chunks);
    Tensor value = zero_parts(given[2], schedule.chunks);
    p.background.grad_query = folded_rows(query);
    p.background.grad_key_parts = folded_rows(key);
    p.background.grad_value_parts = folded_rows(value);
    arguments.attend_backward(schedule);
    grads = {query, total(key, given[1]), total(value, given[2])};
  }
  // One pass finds them all; those that nobody asks for have no rows.
  if (!needs_queries) grad_q = no_rows(q), grads.clear();
  if (!needs_points) return {grad_q, no_rows(k), no_rows(v), grads};
  for (const Tensor& grad : {grad_k, grad_v}) clear_untouched(grad, touched);
  return {grad_q, torch::stable::to(grad_k, k.scalar_type()),
          torch::stable::to(grad_v, v.scalar_type()), grads};
}

constexpr int64_t kRowsPerItem = 512;  // of a rotation; its sums over rows run item by item

struct RotationArguments {
  RotationArguments(const Tensor& shape, const Tensor& coordinates, const Tensor& frequencies) {
    STD_TORCH_CHECK(shape.dim() == 3 && shape.size(2) % 2 == 0 && coordinates.dim() == 2,
                    "vicinal: x must be [n, H, d] with an even d, and coordinates [n, C]");
    rotation.heads = shape.size(1);
    rotation.pairs = shape.size(1) * (shape.size(2) / 2);
    rotation.coordinates_per_row = coordinates.size(1);
    STD_TORCH_CHECK(coordinates.is_contiguous() && frequencies.is_contiguous() &&
                        coordinates.size(0) == shape.size(0) && coordinates.size(1) >= 1 &&
                        frequencies.numel() == coordinates.size(1) * rotation.pairs &&
                        coordinates.scalar_type() == sum_type(shape) &&
                        frequencies.scalar_type() == sum_type(shape),
                    "vicinal: x, coordinates and frequencies do not fit each other");
    rotation.coordinates = coordinates.data_ptr();
    rotation.frequencies = frequencies.data_ptr();
  }

  void run(const Tensor& x, bool forward) const {
    share_out(x.size(0), kRowsPerItem, [&](Work& work) {
      kernels().rotate(storage_of(x), rotation, work, forward);
    });
  }

  Rotation rotation;
};

Tensor rotate(Tensor x, Tensor coordinates, Tensor frequencies) {
  RotationArguments arguments(x, coordinates, frequencies);
  const Tensor in = side_by_side(x);
  Tensor out = new_tensor(x, {x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  arguments.rotation.x = rows_of(in);
  arguments.rotation.out = rows_of(out);
  arguments.run(in, true);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> rotate_backward(Tensor grad_out, Tensor out, Tensor coordinates,
                                                   Tensor frequencies) {
  RotationArguments arguments(out, coordinates, frequencies);
  Rotation& r = arguments.rotation;
  const Tensor grad = side_by_side(grad_out);
  STD_TORCH_CHECK(grad.size(0) == out.size(0) && grad.size(1) == out.size(1) &&
                      grad.size(2) == out.size(2) && out.is_contiguous() &&
                      grad.scalar_type() == out.scalar_type(),
                  "vicinal: out and its gradient do not fit each other");
  const int64_t items = (out.size(0) + kRowsPerItem - 1) / kRowsPerItem;
  Tensor grad_x = new_tensor(out, {out.size(0), out.size(1), out.size(2)}, out.scalar_type());
  Tensor grad_coordinates = torch::stable::empty_like(coordinates);
  Tensor parts = zero_parts(frequencies, items);
  r.out = rows_of(out);
  r.grad_out = rows_of(grad);
  r.grad_x = rows_of(grad_x);
  r.grad_coordinates = grad_coordinates.data_ptr();
  r.grad_frequency_parts = parts.data_ptr();
  arguments.run(out, false);
  return {grad_x, grad_coordinates, total(parts, frequencies)};
}

const int64_t* numbers(const Tensor& x, int64_t numel) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Long && x.is_contiguous() && x.numel() == numel,
                  "vicinal: keys and rows must be contiguous int64 of sizes that fit each other");
  return x.const_data_ptr<int64_t>();
}

std::tuple<Tensor, Tensor> find_slices(Tensor sorted_keys, Tensor centers, Tensor visits, Tensor level,
                                       Tensor offset, Tensor radius) {
  RowSearch s;
  s.levels = centers.size(0);
  s.queries = centers.size(1);
  s.rows = level.numel();
  s.n_keys = sorted_keys.numel();
  s.keys = numbers(sorted_keys, s.n_keys);
  s.centers = numbers(centers, s.levels * s.queries);
  s.visits = indices(visits, s.queries);
  s.level = numbers(level, s.rows);
  s.offset = numbers(offset, s.rows);
  s.radius = numbers(radius, s.rows);
  for (int64_t row = 0; row < s.rows; ++row)
    STD_TORCH_CHECK(s.level[row] >= 0 && s.level[row] < s.levels, "vicinal: a row of no level");
  Tensor starts = new_tensor(visits, {s.queries, s.rows}, ScalarType::Int);
  Tensor stops = new_tensor(visits, {s.queries, s.rows}, ScalarType::Int);
  s.starts = static_cast<int32_t*>(starts.data_ptr());
  s.stops = static_cast<int32_t*>(stops.data_ptr());
  const Places places(s.keys, s.n_keys);
  torch::stable::parallel_for(0, s.queries, kRowsPerItem, [&](int64_t begin, int64_t end) {
    find_rows(s, places, begin, end);
  });
  return {starts, stops};
}

}  // namespace
}  // namespace vicinal

STABLE_TORCH_LIBRARY_IMPL(vicinal, CPU, m) {
  m.impl("neighborhood_attention", TORCH_BOX(&vicinal::forward));
  m.impl("neighborhood_attention_backward", TORCH_BOX(&vicinal::backward));
  m.impl("new_rows", TORCH_BOX(&vicinal::new_rows));
  m.impl("find_slices", TORCH_BOX(&vicinal::find_slices));
  m.impl("rotate", TORCH_BOX(&vicinal::rotate));
  m.impl("rotate_backward", TORCH_BOX(&vicinal::rotate_backward));
}
