// The gathered products of the attention kernel against plain loops, for one and for two queries
// and one layout of packed rows of float32: HEADS heads per vector of VICINAL_BYTES. Rows of 29
// vectors have blocks of every size. The number of keys is no multiple of what loops are unrolled by.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "params.h"

#define VICINAL_ISA baseline
#ifndef VICINAL_BYTES
#define VICINAL_BYTES 16
#endif
#include "kernels/simd.h"
#include "kernels/packing.h"
#include "kernels/gather_products.h"

namespace {

using namespace vicinal::baseline;
using L = PackedLayout<float, HEADS>;
using V = Vector<float>;

constexpr int kRows = 50, kVectors = 29, kKeys = 27, kPadded = 32, kWidth = kVectors * L::kLanes;

uint32_t random_bits() {
  static uint32_t state = 1;
  return (state = state * 1664525 + 1013904223) >> 8;
}

std::vector<V> random_vectors(int count) {
  std::vector<V> vectors(count);
  for (V& vector : vectors)
    for (int lane = 0; lane < L::kLanes; ++lane) vector[lane] = random_bits() * 0x1p-23f - 1;
  return vectors;
}

float* floats(std::vector<V>& vectors) { return reinterpret_cast<float*>(vectors.data()); }

// What a query gives to the products, and gets from them: ours, and that of plain loops.
struct Query {
  std::vector<V> vector = random_vectors(kVectors), sums = random_vectors(kVectors);
  // One float after the start of a vector, as keys that two queries share may be.
  std::vector<V> weights = random_vectors(kPadded + 1), dots = random_vectors(kPadded + 1);
  std::vector<double> true_dots = std::vector<double>(kKeys * HEADS);
  std::vector<double> true_sums = std::vector<double>(floats(sums), floats(sums) + kWidth);
  float* shifted(std::vector<V>& vectors) { return floats(vectors) + 1; }
};

double error = 0;
void compare(const float* ours, const std::vector<double>& truth) {
  for (size_t i = 0; i < truth.size(); ++i) {
    const double difference = std::fabs(ours[i] - truth[i]);
    if (!(difference <= error)) error = difference;  // also where it is not a number
  }
}

// Runs all products for so many queries at once.
template <typename... One>
void check(One... query) {
  constexpr int queries = sizeof...(query);
  std::vector<V> rows = random_vectors(kRows * kVectors);
  std::vector<double> true_rows(floats(rows), floats(rows) + kRows * kWidth);
  std::vector<int32_t> slots(kPadded);  // some twice
  for (int32_t& slot : slots) slot = random_bits() % kRows;
  for (int key = 0; key < kKeys; ++key)
    for (int i = 0; i < kWidth; ++i) {
      const double x = floats(rows)[slots[key] * kWidth + i];
      const auto add = [&](Query& q) {
        const double weight = q.shifted(q.weights)[key * HEADS + i % HEADS];
        const double y = floats(q.vector)[i];
        q.true_dots[key * HEADS + i % HEADS] += x * y;
        q.true_sums[i] += weight * x;
        true_rows[slots[key] * kWidth + i] += weight * y;
      };
      (add(query), ...);
    }
  const PackedRows<L> packed{rows.data(), kVectors};
  gather_dot<L, queries>(packed, slots.data(), kKeys, {query.vector.data()...},
                         {query.shifted(query.dots)...});
  gather_weighted_sum<L, queries>({query.shifted(query.weights)...}, slots.data(), kKeys, packed,
                                  {query.sums.data()...});
  scatter_add_outer<L, queries>({query.shifted(query.weights)...}, slots.data(), kKeys,
                                {query.vector.data()...}, packed);
  (compare(query.shifted(query.dots), query.true_dots), ...);
  (compare(floats(query.sums), query.true_sums), ...);
  compare(floats(rows), true_rows);
}

}  // namespace

int main() {
  check(Query());
  check(Query(), Query());
  std::printf("%g\n", error);
}
