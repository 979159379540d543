// The products of which attention consists, on packed rows: see layout.h.
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

  // In bytes: counted in vectors, the product would be shifted once more for every row.
  V* row(int64_t slot) const {
    const int64_t bytes = vectors * sizeof(V);
    return reinterpret_cast<V*>(reinterpret_cast<char*>(data) + slot * bytes);
  }
  // The same rows, from a vector of each on.
  PackedRows from(int64_t first) const { return {data + first, vectors}; }
};

// Calls body(key, row) for kStep rows by number, key a constant. Loads are what the products wait
// for, so two slots are read at a time.
template <typename L, typename Body>
VICINAL_INLINE inline void for_rows(const PackedRows<L>& rows, const int32_t* slots,
                                    const Body& body) {
  constexpr int first = std::endian::native == std::endian::little ? 0 : 32;
  for_constants<kStep<L> / 2>([&](auto pair) VICINAL_INLINE {
    uint64_t both;
    std::memcpy(&both, slots + 2 * pair, sizeof(both));
    for_constants<2>([&](auto second) VICINAL_INLINE {
      const int64_t slot = uint32_t(both >> (second ? 32 - first : first));
      body(std::integral_constant<int, 2 * pair + second>(), rows.row(slot));
    });
  });
}

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
  if (rows.vectors == 0) std::fill_n(out, count / L::kSpan, Vector<Real>{});
  for_chunks(rows.vectors, [&](int64_t first, auto chunk) VICINAL_INLINE {
    const PackedRows<L> part = rows.from(first);
    Vector<Real> channels[chunk];
    for_constants<chunk>([&](auto j) VICINAL_INLINE { channels[j] = column[first + j]; });
    for (int64_t u = 0; u < count; u += kStep<L>) {
      Vector<Real> sums[kStep<L>];
      for_rows<L>(part, slots + u, [&](auto key, const Vector<Real>* row) VICINAL_INLINE {
        Vector<Real> sum{};
        for_constants<chunk>([&](auto j) VICINAL_INLINE { sum += row[j] * channels[j]; });
        sums[key] = sum;
      });
      for_constants<kStep<L> / L::kSpan>([&](auto b) VICINAL_INLINE {
        Vector<Real>& total = out[u / L::kSpan + b];
        const Vector<Real> keys = sum_across<L>(sums + b * L::kSpan);
        total = first == 0 ? keys : total + keys;
      });
    }
  });
}

// Calls body(weight, key, row) for each of the neighbors, weight in all lanes of its head.
template <typename L, typename Body>
VICINAL_INLINE inline void for_neighbors(const Vector<typename L::Real>* weights,
                                         const int32_t* slots, int64_t count,
                                         const PackedRows<L>& rows, const Body& body) {
  const auto* numbers = reinterpret_cast<const typename L::Real*>(weights);
  for (int64_t u = 0; u < count; u += kStep<L>)
    for_rows<L>(rows, slots + u, [&](auto key, auto* row) VICINAL_INLINE {
      body(per_head<L>(numbers + (u + key) * L::kHeads), key, row);
    });
}

// out += sum over u of weights[u] * rows[slots[u]].
template <typename L, typename Real = typename L::Real>
inline void accumulate(const Vector<Real>* weights, const int32_t* slots, int64_t count,
                       const PackedRows<L>& rows, Vector<Real>* out) {
  for_chunks(rows.vectors, [&](int64_t first, auto chunk) VICINAL_INLINE {
    const PackedRows<L> part = rows.from(first);
    Vector<Real> sums[2][chunk];  // two, so that additions need not wait for one another
    for_constants<chunk>([&](auto j) VICINAL_INLINE {
      sums[0][j] = out[first + j];
      sums[1][j] = Vector<Real>{};
    });
    for_neighbors<L>(weights, slots, count, part,
                     [&](Vector<Real> weight, auto key, const Vector<Real>* row) VICINAL_INLINE {
                       for_constants<chunk>([&](auto j) VICINAL_INLINE {
                         sums[key % 2][j] += weight * row[j];
                       });
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
    for_neighbors<L>(weights, slots, count, part,
                     [&](Vector<Real> weight, auto, Vector<Real>* row) VICINAL_INLINE {
                       for_constants<chunk>([&](auto j) VICINAL_INLINE {
                         row[j] += weight * channels[j];
                       });
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
