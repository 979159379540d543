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

// Calls body(key, row) for `keys` gathered rows; key is a compile-time constant. The loops are
// bound by loads, so one 64-bit load reads two slots.
template <int keys, typename L, typename Body>
VICINAL_INLINE inline void for_gathered_rows(const PackedRows<L>& rows, const int32_t* slots,
                                             const Body& body) {
  static_assert(keys % 2 == 0);
  constexpr int first = std::endian::native == std::endian::little ? 0 : 32;
  static_for<keys / 2>([&](auto pair) VICINAL_INLINE {
    uint64_t both;
    std::memcpy(&both, slots + 2 * pair, sizeof(both));
    static_for<2>([&](auto second) VICINAL_INLINE {
      const int64_t slot = uint32_t(both >> (second ? 32 - first : first));
      body(std::integral_constant<int, 2 * pair + second>(), rows.row(slot));
    });
  });
}

// Whether there are 32 registers for rows that fill as many. AVX-512 has them too, but a row of
// several heads has at most four vectors of 64 bytes.
#ifdef __aarch64__
constexpr bool kHas32Registers = true;
#else
constexpr bool kHas32Registers = false;
#endif

// The most vectors of a row that are kept in registers, beside partial sums of several keys. With
// more, the chains of additions would be longer than processors reorder.
template <typename L>
constexpr int kDotBlock = L::kLanesPerHead > 4 ? 4 : 8;
// The same without partial sums.
template <typename L>
constexpr int kSumBlock = kHas32Registers ? 16 : kDotBlock<L>;
// The keys whose dot products are computed at once, a multiple of kLanesPerHead. Their chains of
// additions hide each other's latency.
template <typename L>
constexpr int kDotKeys = kHas32Registers ? kKeyUnroll<L> : L::kLanesPerHead;

// GCC for AArch64 moves loads ahead of what needs them, more than there are registers for. None
// moves across this.
VICINAL_INLINE inline void keep_order_of_loads() {
#if defined(__aarch64__) && !defined(__clang__)
  asm volatile("");
#endif
}

// Calls body(first, size) for blocks of the vectors of a row that are kept in registers: of `size`,
// then of half as many down to four, then of one. size is a compile-time constant.
template <int size, typename Body>
VICINAL_INLINE inline void for_register_blocks(int64_t vectors, const Body& body,
                                               int64_t first = 0) {
  for (; first + size <= vectors; first += size) body(first, std::integral_constant<int, size>());
  if constexpr (size > 1) for_register_blocks<(size > 4 ? size / 2 : 1)>(vectors, body, first);
}

// parts[key] = row[slots[key]] * channels, summed over `size` vectors.
template <int keys, int size, typename L, typename Real = typename L::Real>
VICINAL_INLINE inline void multiply_rows(const PackedRows<L>& rows, const int32_t* slots,
                                         const Vector<Real>* channels, Vector<Real>* parts) {
  const Vector<Real>* gathered[keys];
  for_gathered_rows<keys>(rows, slots, [&](auto key, const Vector<Real>* row) VICINAL_INLINE {
    gathered[key] = row;
    parts[key] = row[0] * channels[0];
  });
  static_for<size - 1>([&](auto j) VICINAL_INLINE {
    static_for<keys>([&](auto key) VICINAL_INLINE {
      parts[key] += gathered[key][j + 1] * channels[j + 1];
    });
  });
}

// out[key, head] = dot(rows[slots[key]], vector), over channels.
template <typename L, typename Real = typename L::Real>
VICINAL_NOINLINE void gather_dot(const PackedRows<L>& rows, const int32_t* slots, int64_t count,
                                 const Vector<Real>* vector, Vector<Real>* out) {
  constexpr int kKeys = kDotKeys<L>, kVectors = kKeys / L::kLanesPerHead;
  if (rows.vectors_per_row == 0) std::fill_n(out, count / L::kLanesPerHead, Vector<Real>{});
  const auto add_block = [&](int64_t first, auto size) VICINAL_INLINE {
    const PackedRows<L> columns = rows.columns_from(first);
    Vector<Real> channels[size];
    static_for<size>([&](auto j) VICINAL_INLINE { channels[j] = vector[first + j]; });
    for (int64_t u = 0; u < count; u += kKeyUnroll<L>)
      static_for<kKeyUnroll<L> / kKeys>([&](auto b) VICINAL_INLINE {
        Vector<Real> parts[kKeys];
        multiply_rows<kKeys, size>(columns, slots + u + b * kKeys, channels, parts);
        static_for<kVectors>([&](auto i) VICINAL_INLINE {
          Vector<Real>& dots = out[u / L::kLanesPerHead + b * kVectors + i];
          const Vector<Real> partial = reduce_channels<L>(parts + i * L::kLanesPerHead);
          dots = first == 0 ? partial : dots + partial;
        });
      });
  };
  for_register_blocks<kDotBlock<L>>(rows.vectors_per_row, add_block);
}

// Calls body(weight, key, row) for every gathered row, with its weight broadcast per head.
template <typename L, typename Body>
VICINAL_INLINE inline void for_weighted_rows(const Vector<typename L::Real>* weights,
                                             const int32_t* slots, int64_t count,
                                             const PackedRows<L>& rows, const Body& body) {
  const auto* values = reinterpret_cast<const typename L::Real*>(weights);
  for (int64_t u = 0; u < count; u += kKeyUnroll<L>)
    for_gathered_rows<kKeyUnroll<L>>(rows, slots + u, [&](auto key, auto* row) VICINAL_INLINE {
      body(broadcast_heads<L>(values + (u + key) * L::kHeads), key, row);
    });
}

// acc += sum over keys of weights[key] * rows[slots[key]]; acc: [vectors_per_row].
template <typename L, typename Real = typename L::Real>
VICINAL_NOINLINE void gather_weighted_sum(const Vector<Real>* weights, const int32_t* slots,
                                          int64_t count, const PackedRows<L>& rows,
                                          Vector<Real>* acc) {
  const int64_t vectors = rows.vectors_per_row;
  for_register_blocks<kSumBlock<L>>(vectors, [&](int64_t first, auto size) VICINAL_INLINE {
    const PackedRows<L> columns = rows.columns_from(first);
    constexpr int chains = size < 8 ? 2 : 1;  // eight sums at once hide the latency of additions
    Vector<Real> sums[chains][size]{};
    static_for<size>([&](auto j) VICINAL_INLINE { sums[0][j] = acc[first + j]; });
    const auto add = [&](Vector<Real> weight, auto key, const Vector<Real>* row) VICINAL_INLINE {
      static_for<size>([&](auto j) VICINAL_INLINE {
        if constexpr (j % 8 == 0) keep_order_of_loads();
        sums[key % chains][j] += weight * row[j];
      });
    };
    for_weighted_rows<L>(weights, slots, count, columns, add);
    static_for<size>([&](auto j) VICINAL_INLINE {
      acc[first + j] = chains > 1 ? sums[0][j] + sums[chains - 1][j] : sums[0][j];
    });
  });
}

// rows[slots[key]] += weights[key] * vector for every key; vector: [vectors_per_row].
template <typename L, typename Real = typename L::Real>
VICINAL_NOINLINE void scatter_add_outer(const Vector<Real>* weights, const int32_t* slots,
                                        int64_t count, const Vector<Real>* vector,
                                        const PackedRows<L>& rows) {
  const int64_t vectors = rows.vectors_per_row;
  for_register_blocks<kSumBlock<L>>(vectors, [&](int64_t first, auto size) VICINAL_INLINE {
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
