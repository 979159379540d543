// The products of which attention consists, on packed rows: see cpu_layout.h.
//
// `slots` number the rows of neighbors, kStep of them at a time.

namespace vicinal::VICINAL_ISA {

// Keys that an inner loop works on at a time: lists are filled up to a multiple of this.
template <typename L>
constexpr int kStep = L::kSpan > 8 ? L::kSpan : 8;

template <typename L>
struct PackedRows {
  Vector<typename L::Real>* data;
  int64_t vectors;  // in each

  Vector<typename L::Real>* row(int64_t slot) const { return data + slot * vectors; }
};

// Calls body(first, chunk) for all vectors of a row, four at a time where there are as many.
template <typename Body>
inline void for_chunks(int64_t vectors, const Body& body) {
  int64_t first = 0;
  for (; first + 4 <= vectors; first += 4) body(first, std::integral_constant<int, 4>());
  for (; first < vectors; ++first) body(first, std::integral_constant<int, 1>());
}

// out[u / kSpan], lane (head, u % kSpan): the sum over channels of rows[slots[u]] * column.
template <typename L, typename Real = typename L::Real>
inline void multiply(const PackedRows<L>& rows, const int32_t* slots, int64_t count,
                     const Vector<Real>* column, Vector<Real>* out) {
  for (int64_t u = 0; u < count; u += kStep<L>) {
    Vector<Real> sums[kStep<L>] = {};
    for_chunks(rows.vectors, [&](int64_t first, auto chunk) {
#pragma GCC unroll 16
      for (int key = 0; key < kStep<L>; ++key) {
        const Vector<Real>* row = rows.row(slots[u + key]) + first;
        for (int j = 0; j < chunk; ++j) sums[key] += row[j] * column[first + j];
      }
    });
#pragma GCC unroll 4
    for (int key = 0; key < kStep<L>; key += L::kSpan) *out++ = sum_across<L>(sums + key);
  }
}

// Calls body(weight, slot, parity) for each of the neighbors, weight in all lanes of its head.
template <typename L, typename Body>
inline void for_neighbors(const Vector<typename L::Real>* weights, const int32_t* slots,
                          int64_t count, const Body& body) {
  for (int64_t u = 0; u < count; u += L::kSpan, ++weights)
    [&]<int... key>(std::integer_sequence<int, key...>) {
      (body(spread<L, key>(*weights), slots[u + key], key % 2), ...);
    }(std::make_integer_sequence<int, L::kSpan>());
}

// out += sum over u of weights[u] * rows[slots[u]].
template <typename L, typename Real = typename L::Real>
inline void accumulate(const Vector<Real>* weights, const int32_t* slots, int64_t count,
                       const PackedRows<L>& rows, Vector<Real>* out) {
  for_chunks(rows.vectors, [&](int64_t first, auto chunk) {
    Vector<Real> sums[2][chunk];  // two, so that additions need not wait for one another
    for (int j = 0; j < chunk; ++j) sums[0][j] = out[first + j], sums[1][j] = Vector<Real>{};
    for_neighbors<L>(weights, slots, count, [&](Vector<Real> weight, int64_t slot, int parity) {
      const Vector<Real>* row = rows.row(slot) + first;
      for (int j = 0; j < chunk; ++j) sums[parity][j] += weight * row[j];
    });
    for (int j = 0; j < chunk; ++j) out[first + j] = sums[0][j] + sums[1][j];
  });
}

// rows[slots[u]] += weights[u] * column, for all u.
template <typename L, typename Real = typename L::Real>
inline void distribute(const Vector<Real>* weights, const int32_t* slots, int64_t count,
                       const Vector<Real>* column, const PackedRows<L>& rows) {
  for_chunks(rows.vectors, [&](int64_t first, auto chunk) {
    Vector<Real> channels[chunk];
    for (int j = 0; j < chunk; ++j) channels[j] = column[first + j];
    for_neighbors<L>(weights, slots, count, [&](Vector<Real> weight, int64_t slot, int) {
      Vector<Real>* row = rows.row(slot) + first;
      for (int j = 0; j < chunk; ++j) row[j] += weight * channels[j];
    });
  });
}

// The sum over channels of a * b, in all lanes of each head.
template <typename L, typename Real = typename L::Real>
inline Vector<Real> dot(const Vector<Real>* a, const Vector<Real>* b, int64_t vectors) {
  Vector<Real> sum{};
  for (int64_t j = 0; j < vectors; ++j) sum += a[j] * b[j];
  return fold<L>(sum, plus);
}

// The sum over neighbors of their weights, in all lanes of each head.
template <typename L, typename Real = typename L::Real>
inline Vector<Real> sum(const Vector<Real>* weights, int64_t count) {
  Vector<Real> sum{};
  for (int64_t b = 0; b < count / L::kSpan; ++b) sum += weights[b];
  return fold<L>(sum, plus);
}

}  // namespace vicinal::VICINAL_ISA
