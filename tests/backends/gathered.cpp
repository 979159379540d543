// The gathered products of the attention kernel against plain loops, for one layout of packed rows
// of float32: HEADS heads per vector of 16 bytes. Rows of 29 vectors have blocks of every size.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
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
#define VICINAL_BYTES 16
#include "kernels/simd.h"
#include "kernels/packing.h"
#include "kernels/gather_products.h"

namespace {

using namespace vicinal::baseline;
using L = PackedLayout<float, HEADS>;
using V = Vector<float>;

constexpr int kRows = 50, kVectors = 29, kKeys = 24, kWidth = kVectors * L::kLanes;

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

}  // namespace

int main() {
  std::vector<V> rows = random_vectors(kRows * kVectors), vector = random_vectors(kVectors);
  std::vector<V> weights = random_vectors(kKeys / L::kLanesPerHead), dots = weights;
  std::vector<V> sums = random_vectors(kVectors);
  std::vector<int32_t> slots(kKeys);  // some twice
  for (int32_t& slot : slots) slot = random_bits() % kRows;
  std::vector<double> true_dots(kKeys * HEADS);
  std::vector<double> true_sums(floats(sums), floats(sums) + kWidth);
  std::vector<double> true_rows(floats(rows), floats(rows) + kRows * kWidth);
  for (int key = 0; key < kKeys; ++key)
    for (int i = 0; i < kWidth; ++i) {
      const double weight = floats(weights)[key * HEADS + i % HEADS];
      const double x = floats(rows)[slots[key] * kWidth + i], y = floats(vector)[i];
      true_dots[key * HEADS + i % HEADS] += x * y;
      true_sums[i] += weight * x;
      true_rows[slots[key] * kWidth + i] += weight * y;
    }
  const PackedRows<L> packed{rows.data(), kVectors};
  gather_dot<L>(packed, slots.data(), kKeys, vector.data(), dots.data());
  gather_weighted_sum<L>(weights.data(), slots.data(), kKeys, packed, sums.data());
  scatter_add_outer<L>(weights.data(), slots.data(), kKeys, vector.data(), packed);
  double error = 0;
  const auto compare = [&](std::vector<V>& ours, const std::vector<double>& truth) {
    for (size_t i = 0; i < truth.size(); ++i)
      error = std::fmax(error, std::fabs(floats(ours)[i] - truth[i]));
  };
  compare(dots, true_dots), compare(sums, true_sums), compare(rows, true_rows);
  std::printf("%g\n", error);
}
