// The products of which attention consists, on packed rows: see cpu_layout.h.
//
// `slots` number the rows of neighbors, kStep of them at a time.

namespace vicinal::VICINAL_ISA {

// Keys that an inner loop works on at a time: lists are filled up to a multiple of this.
template <typename L>
constexpr int kStep = L::kSpan > 8 ? L::kSpan : 8;

template <typename L>
struct PackedRows {
  using V = Vector<typename L::Real>;

  V* data;
  int64_t vectors;  // in each

  V* row(int64_t slot) const { return data + slot * vectors; }
  // The same rows, from a vector of each on.
  PackedRows from(int64_t first) const { return {data + first, vectors}; }
};

// Calls body(first, chunk) for all vectors of a row, four at a time where there are as many.
template <typename Body>
VICINAL_INLINE inline void for_chunks(int64_t vectors, const Body& body) {
  int64_t first = 0;
  for (; first + 4 <= vectors; first += 4) body(first, std::integral_constant<int, 4>());
  for (; first < vectors; ++first) body(first, std::integral_constant<int, 1>());
}

// out[u / kSpan], lane (u % kSpan, head): the sum over channels of rows[slots[u]] * column.
template <typename L, typename Real = typename L::Real>
inline void multiply(const PackedRows<L>& rows, const int32_t* slots, int64_t count,
                     const Vector<Real>* column, Vector<Real>* out) {
  for_chunks(rows.vectors, [&](int64_t first, auto chunk) VICINAL_INLINE {
    const PackedRows<L> part = rows.from(first);
    Vector<Real> channels[chunk];
    for_constants<chunk>([&](auto j) VICINAL_INLINE { channels[j] = column[first + j]; });
    for (int64_t u = 0; u < count; u += kStep<L>) {
      Vector<Real> sums[kStep<L>] = {};
#pragma GCC unroll 16
      for (int key = 0; key < kStep<L>; ++key) {
        const Vector<Real>* row = part.row(slots[u + key]);
        for_constants<chunk>([&](auto j) VICINAL_INLINE { sums[key] += row[j] * channels[j]; });
      }
#pragma GCC unroll 4
      for (int b = 0; b < kStep<L> / L::kSpan; ++b) {
        Vector<Real>& total = out[u / L::kSpan + b];
        const Vector<Real> sum = sum_across<L>(sums + b * L::kSpan);
        total = first == 0 ? sum : total + sum;
      }
    }
  });
}

// Calls body(weight, slot, parity) for each of the neighbors, weight in all lanes of its head.
template <typename L, typename Body>
VICINAL_INLINE inline void for_neighbors(const Vector<typename L::Real>* weights, const int32_t* slots,
                          int64_t count, const Body& body) {
  const auto* numbers = reinterpret_cast<const typename L::Real*>(weights);
  for (int64_t u = 0; u < count; u += kStep<L>)
    for_constants<kStep<L>>([&](auto key) VICINAL_INLINE {
      body(per_head<L>(numbers + (u + key) * L::kHeads), slots[u + key],
           std::integral_constant<int, key % 2>());
    });
}

// out += sum over u of weights[u] * rows[slots[u]].
template <typename L, typename Real = typename L::Real>
inline void accumulate(const Vector<Real>* weights, const int32_t* slots, int64_t count,
                       const PackedRows<L>& rows, Vector<Real>* out) {
  for_chunks(rows.vectors, [&](int64_t first, auto chunk) VICINAL_INLINE {
    const PackedRows<L> part = rows.from(first);
    Vector<Real> sums[2][chunk];  // two, so that additions need not wait for one another
    for_constants<chunk>([&](auto j) VICINAL_INLINE { sums[0][j] = out[first + j], sums[1][j] = Vector<Real>{}; });
    for_neighbors<L>(weights, slots, count, [&](Vector<Real> weight, int64_t slot, auto parity) VICINAL_INLINE {
      const Vector<Real>* row = part.row(slot);
      for_constants<chunk>([&](auto j) VICINAL_INLINE { sums[parity][j] += weight * row[j]; });
    });
    for_constants<chunk>([&](auto j) VICINAL_INLINE { out[first + j] = sums[0][j] + sums[1][j]; });
  });
}

// rows[slots[u]] += weights[u] * column, for all u.
template <typename L, typename Real = typename L::Real>
inline void distribute(const Vector<Real>* weights, const int32_t* slots, int64_t count,
                       const Vector<Real>* column, const PackedRows<L>& rows) {
  for_chunks(rows.vectors, [&](int64_t first, auto chunk) VICINAL_INLINE {
    const PackedRows<L> part = rows.from(first);
    Vector<Real> channels[chunk];
    for_constants<chunk>([&](auto j) VICINAL_INLINE { channels[j] = column[first + j]; });
    for_neighbors<L>(weights, slots, count, [&](Vector<Real> weight, int64_t slot, auto) VICINAL_INLINE {
      Vector<Real>* row = part.row(slot);
      for_constants<chunk>([&](auto j) VICINAL_INLINE { row[j] += weight * channels[j]; });
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
