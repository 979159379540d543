// The attention kernel on plain threads, for ThreadSanitizer: torch's own threads come from an
// OpenMP that it cannot follow. Random problems with many shared points; forward and backward must
// have the same bits on any number of threads.
//
// Usage: races PROBLEMS

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <random>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "buffer.h"
#include "params.h"
#include "scheduling.h"

#define VICINAL_ISA baseline
#define VICINAL_BYTES 16
#include "kernels/kernels.h"

namespace {

using namespace vicinal;

constexpr int64_t kHeads = 4, kWidth = 6, kSlices = 3;

// A float32 tensor [rows, kHeads, kWidth].
struct Matrix {
  explicit Matrix(int64_t rows) : data(rows * kHeads * kWidth) {}
  Rows rows() {
    return {data.data(), kHeads, kWidth, kHeads * kWidth, kWidth, Dtype::float32};
  }
  std::vector<float> data;
};

struct Result {
  explicit Result(int64_t n, int64_t points)
      : out(n), grad_q(n), grad_k(points), grad_v(points), lse(n * kHeads) {}
  bool operator==(const Result& other) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(out.data, other.out.data) && same(lse, other.lse) &&
           same(grad_q.data, other.grad_q.data) && same(grad_k.data, other.grad_k.data) &&
           same(grad_v.data, other.grad_v.data);
  }
  Matrix out, grad_q, grad_k, grad_v;
  std::vector<float> lse;  // [N, H]
};

class Problem {
 public:
  explicit Problem(uint32_t seed)
      : random_(seed),
        n_(number(1, 400)),
        points_(number(1, 300)),
        q_(n_), grad_out_(n_), k_(points_), v_(points_),
        traversal_(n_), order_(points_), starts_(n_ * kSlices), stops_(n_ * kSlices),
        grad_lse_(n_ * kHeads) {
    std::normal_distribution<float> normal;
    for (Matrix* x : {&q_, &grad_out_, &k_, &v_})
      for (float& value : x->data) value = normal(random_);
    for (float& value : grad_lse_) value = normal(random_);
    for (std::vector<int32_t>* ids : {&traversal_, &order_}) {
      std::iota(ids->begin(), ids->end(), 0);
      std::shuffle(ids->begin(), ids->end(), random_);
    }
    // Slices of a query do not overlap: each lies in a third of the sorted points.
    for (int64_t i = 0; i < n_ * kSlices; ++i) {
      const int64_t first = points_ * (i % kSlices) / kSlices;
      const int64_t end = points_ * (i % kSlices + 1) / kSlices;
      starts_[i] = number(first, end);
      stops_[i] = number(starts_[i], std::min<int64_t>(end, starts_[i] + 12));
    }
  }

  Result run(int n_threads) {
    Result result(n_, points_);
    std::vector<int32_t> heads_written(points_);
    AttentionParams p;
    p.n_heads = kHeads;
    p.tile_queries = std::clamp<int64_t>(n_ / 64, 4, kMaxTile);
    p.slices = {traversal_.data(), starts_.data(), stops_.data(), order_.data(),
                n_, kSlices, points_};
    p.dropout.active = true;
    p.dropout.seed = 7, p.dropout.threshold = 1u << 29, p.dropout.keep_scale = 8.0 / 7;
    p.q = q_.rows(), p.k = k_.rows(), p.v = v_.rows();
    p.out = result.out.rows();
    p.lse = result.lse.data();
    const int64_t n_tiles = (n_ + p.tile_queries - 1) / p.tile_queries;
    WorkQueue queue(n_tiles, 1);
    on_threads(n_threads, [&] { baseline::attention_forward(p, queue); });
    p.grad_lse = grad_lse_.data();
    p.grad_out = grad_out_.rows();
    p.grad_q = result.grad_q.rows();
    p.grad_k = result.grad_k.rows(), p.grad_v = result.grad_v.rows();
    p.heads_written = heads_written.data();
    BackwardSchedule schedule(p.slices, p.tile_queries, 1);
    if (n_threads > 1) {
      on_threads(n_threads, [&] { schedule.list_groups(); });
      schedule.find_predecessors();
    }
    on_threads(n_threads, [&] { baseline::attention_backward(p, schedule); });
    return result;
  }

 private:
  int64_t number(int64_t low, int64_t high) {  // both included
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  template <typename Body>
  static void on_threads(int count, const Body& body) {
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i) threads.emplace_back(body);
    for (std::thread& thread : threads) thread.join();
  }

  std::mt19937 random_;
  const int64_t n_, points_;
  Matrix q_, grad_out_, k_, v_;
  std::vector<int32_t> traversal_, order_, starts_, stops_;
  std::vector<float> grad_lse_;  // [N, H]
};

}  // namespace

int main(int, char** arguments) {
  for (int seed = 0; seed < std::atoi(arguments[1]); ++seed) {
    Problem problem(seed);
    const Result expected = problem.run(1);
    for (int n_threads : {2, 4})
      if (!(problem.run(n_threads) == expected)) {
        std::printf("problem %d has other bits on %d threads\n", seed, n_threads);
        return 1;
      }
  }
  std::printf("%s problems\n", arguments[1]);
}
