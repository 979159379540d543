// Matrix-vector products with gathered rows, of which attention consists: dot products, weighted
// sums and scattered outer products. See kernels.h for how it is included.
//
// `slots` [count] are row indices into PackedRows [slots, vectors_per_row]. `count` is a multiple
// of kKeyUnroll. Weights and dot products are [count / kLanesPerHead], vectors of
// [kLanesPerHead keys, kHeads heads]. Loops are register-blocked over channels and unrolled over
// keys.

namespace vicinal::VICINAL_ISA {

// The unroll factor over keys of the inner loops. Slot lists are padded to a multiple of it.
template <typename L>
constexpr int kKeyUnroll = L::kLanesPerHead > 8 ? L::kLanesPerHead : 8;

// Calls body(key, row) for kKeyUnroll gathered rows; key is a compile-time constant. The loops are
// bound by loads, so one 64-bit load reads two slots.
template <typename L, typename Body>
VICINAL_INLINE inline void for_gathered_rows(const PackedRows<L>& rows, const int32_t* slots,
                                             const Body& body) {
  constexpr int first = std::endian::native == std::endian::little ? 0 : 32;
  static_for<kKeyUnroll<L> / 2>([&](auto pair) VICINAL_INLINE {
    uint64_t both;
    std::memcpy(&both, slots + 2 * pair, sizeof(both));
    static_for<2>([&](auto second) VICINAL_INLINE {
      const int64_t slot = uint32_t(both >> (second ? 32 - first : first));
      body(std::integral_constant<int, 2 * pair + second>(), rows.row(slot));
    });
  });
}

// Calls body(first, size) for blocks of the vectors of a row that are kept in registers: of four
// vectors, then of one. size is a compile-time constant.
template <typename Body>
VICINAL_INLINE inline void for_register_blocks(int64_t vectors, const Body& body) {
  int64_t first = 0;
  for (; first + 4 <= vectors; first += 4) body(first, std::integral_constant<int, 4>());
  for (; first < vectors; ++first) body(first, std::integral_constant<int, 1>());
}

// out[key, head] = dot(rows[slots[key]], vector), over channels.
template <typename L, typename Real = typename L::Real>
inline void gather_dot(const PackedRows<L>& rows, const int32_t* slots, int64_t count,
                       const Vector<Real>* vector, Vector<Real>* out) {
  if (rows.vectors_per_row == 0) std::fill_n(out, count / L::kLanesPerHead, Vector<Real>{});
  for_register_blocks(rows.vectors_per_row, [&](int64_t first, auto size) VICINAL_INLINE {
    const PackedRows<L> columns = rows.columns_from(first);
    Vector<Real> channels[size];
    static_for<size>([&](auto j) VICINAL_INLINE { channels[j] = vector[first + j]; });
    for (int64_t u = 0; u < count; u += kKeyUnroll<L>) {
      Vector<Real> parts[kKeyUnroll<L>];
      const auto multiply = [&](auto key, const Vector<Real>* row) VICINAL_INLINE {
        Vector<Real> sum{};
        static_for<size>([&](auto j) VICINAL_INLINE { sum += row[j] * channels[j]; });
        parts[key] = sum;
      };
      for_gathered_rows<L>(columns, slots + u, multiply);
      static_for<kKeyUnroll<L> / L::kLanesPerHead>([&](auto b) VICINAL_INLINE {
        Vector<Real>& dots = out[u / L::kLanesPerHead + b];
        const Vector<Real> partial = reduce_channels<L>(parts + b * L::kLanesPerHead);
        dots = first == 0 ? partial : dots + partial;
      });
    }
  });
}

// Calls body(weight, key, row) for every gathered row, with its weight broadcast per head.
template <typename L, typename Body>
VICINAL_INLINE inline void for_weighted_rows(const Vector<typename L::Real>* weights,
                                             const int32_t* slots, int64_t count,
                                             const PackedRows<L>& rows, const Body& body) {
  const auto* values = reinterpret_cast<const typename L::Real*>(weights);
  for (int64_t u = 0; u < count; u += kKeyUnroll<L>)
    for_gathered_rows<L>(rows, slots + u, [&](auto key, auto* row) VICINAL_INLINE {
      body(broadcast_heads<L>(values + (u + key) * L::kHeads), key, row);
    });
}

// acc += sum over keys of weights[key] * rows[slots[key]]; acc: [vectors_per_row].
template <typename L, typename Real = typename L::Real>
inline void gather_weighted_sum(const Vector<Real>* weights, const int32_t* slots, int64_t count,
                                const PackedRows<L>& rows, Vector<Real>* acc) {
  for_register_blocks(rows.vectors_per_row, [&](int64_t first, auto size) VICINAL_INLINE {
    const PackedRows<L> columns = rows.columns_from(first);
    Vector<Real> sums[2][size];  // two independent chains hide the latency of additions
    static_for<size>([&](auto j) VICINAL_INLINE {
      sums[0][j] = acc[first + j];
      sums[1][j] = Vector<Real>{};
    });
    const auto add = [&](Vector<Real> weight, auto key, const Vector<Real>* row) VICINAL_INLINE {
      static_for<size>([&](auto j) VICINAL_INLINE { sums[key % 2][j] += weight * row[j]; });
    };
    for_weighted_rows<L>(weights, slots, count, columns, add);
    static_for<size>([&](auto j) VICINAL_INLINE { acc[first + j] = sums[0][j] + sums[1][j]; });
  });
}

// rows[slots[key]] += weights[key] * vector for every key; vector: [vectors_per_row].
template <typename L, typename Real = typename L::Real>
inline void scatter_add_outer(const Vector<Real>* weights, const int32_t* slots, int64_t count,
                              const Vector<Real>* vector, const PackedRows<L>& rows) {
  for_register_blocks(rows.vectors_per_row, [&](int64_t first, auto size) VICINAL_INLINE {
    const PackedRows<L> columns = rows.columns_from(first);
    Vector<Real> channels[size];
    static_for<size>([&](auto j) VICINAL_INLINE { channels[j] = vector[first + j]; });
    const auto add = [&](Vector<Real> weight, auto, Vector<Real>* row) VICINAL_INLINE {
      static_for<size>([&](auto j) VICINAL_INLINE { row[j] += weight * channels[j]; });
    };
    for_weighted_rows<L>(weights, slots, count, columns, add);
  });
}

// dot(a, b) over channels, broadcast per head; a, b: [vectors].
template <typename L, typename Real = typename L::Real>
inline Vector<Real> dot(const Vector<Real>* a, const Vector<Real>* b, int64_t vectors) {
  Vector<Real> sum{};
  for (int64_t j = 0; j < vectors; ++j) sum += a[j] * b[j];
  return reduce_lanes<L>(sum, plus);
}

// The sum of weights over keys, broadcast per head.
template <typename L, typename Real = typename L::Real>
inline Vector<Real> sum_keys(const Vector<Real>* weights, int64_t count) {
  Vector<Real> sum{};
  for (int64_t b = 0; b < count / L::kLanesPerHead; ++b) sum += weights[b];
  return reduce_lanes<L>(sum, plus);
}

}  // namespace vicinal::VICINAL_ISA
