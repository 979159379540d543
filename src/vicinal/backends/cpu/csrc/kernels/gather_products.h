// Matrix-vector products with gathered rows, of which attention consists: dot products, weighted
// sums and scattered outer products. See kernels.h for how it is included.
//
// `slots` [count] are row indices into PackedRows [slots, vectors_per_row]. Weights and dot
// products are [count, kHeads], of one query or of two: a row is loaded once for both. Loops are
// register-blocked over channels and unrolled over keys.

namespace vicinal::VICINAL_ISA {

// Whether there are 32 registers for rows that fill as many. AVX-512 has them too, but a row of
// several heads has at most four vectors of 64 bytes.
#ifdef __aarch64__
constexpr bool kHas32Registers = true;
#else
constexpr bool kHas32Registers = false;
#endif

// The keys whose dot products with two queries fit in registers at once.
constexpr int kPairKeys = kHas32Registers || VICINAL_BYTES == 64 ? 8 : 4;

// The unroll factor over keys of the inner loops.
template <typename L>
constexpr int kKeyUnroll = std::max(L::kLanesPerHead, kPairKeys);

// A pointer for each of the queries of a product.
template <typename T, int queries>
using PerQuery = std::array<T*, queries>;

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

// The most vectors of a row that are kept in registers, beside partial sums of several keys. With
// more, the chains of additions would be longer than processors reorder.
template <typename L>
constexpr int kDotBlock = L::kLanesPerHead > 4 ? 4 : 8;
// The same without partial sums, for each of the queries.
template <typename L, int queries>
constexpr int kSumBlock = std::max(4, (kHas32Registers ? 16 : kDotBlock<L>) / queries);
// The keys whose dot products are computed at once. Their chains of additions hide each other's
// latency.
template <typename L, int queries>
constexpr int kDotKeys = queries == 2      ? kPairKeys
                         : kHas32Registers ? kKeyUnroll<L>
                                           : L::kLanesPerHead;

// GCC for AArch64 moves loads ahead of what needs them, more than there are registers for. None
// moves across this.
VICINAL_INLINE inline void keep_order_of_loads() {
#if defined(__aarch64__) && !defined(__clang__)
  asm volatile("");
#endif
}

// A value of memory that several products need, loaded once: GCC would load it for each of them.
template <int uses, typename V>
VICINAL_INLINE inline V load_once(const V& memory) {
  V x = memory;
#if defined(__AVX512F__) || (defined(__x86_64__) && VICINAL_BYTES < 64)
  if constexpr (uses > 1) asm("" : "+v"(x));
#elif defined(__aarch64__)
  if constexpr (uses > 1) asm("" : "+w"(x));
#endif
  return x;
}

// Calls body(first, size) for blocks of the vectors of a row that are kept in registers: of `size`,
// then of half as many down to four, then of one. size is a compile-time constant.
template <int size, typename Body>
VICINAL_INLINE inline void for_register_blocks(int64_t vectors, const Body& body,
                                               int64_t first = 0) {
  for (; first + size <= vectors; first += size) body(first, std::integral_constant<int, size>());
  if constexpr (size > 1) for_register_blocks<(size > 4 ? size / 2 : 1)>(vectors, body, first);
}

// parts[query][key] = row[slots[key]] * channels(query), summed over `size` vectors.
template <int keys, int size, int queries, typename L, typename Channels>
VICINAL_INLINE inline void multiply_rows(const PackedRows<L>& rows, const int32_t* slots,
                                         const Channels& channels,
                                         Vector<typename L::Real> (*parts)[keys]) {
  using V = Vector<typename L::Real>;
  const V* gathered[keys];
  for_gathered_rows<keys>(rows, slots, [&](auto key, const V* row) VICINAL_INLINE {
    gathered[key] = row;
    const V x = load_once<queries>(row[0]);
    static_for<queries>([&](auto q) VICINAL_INLINE { parts[q][key] = x * channels(q, 0); });
  });
  static_for<size - 1>([&](auto j) VICINAL_INLINE {
    if constexpr (queries > 1) keep_order_of_loads();
    V factors[queries];
    static_for<queries>([&](auto q) VICINAL_INLINE { factors[q] = channels(q, j + 1); });
    static_for<keys>([&](auto key) VICINAL_INLINE {
      const V x = load_once<queries>(gathered[key][j + 1]);
      static_for<queries>([&](auto q) VICINAL_INLINE { parts[q][key] += x * factors[q]; });
    });
  });
}

// The dot products of `keys` rows, a multiple of kLanesPerHead, over `size` vectors:
// store(query, i, vector i of [keys, kHeads]).
template <int keys, int size, int queries, typename L, typename Channels, typename Store>
VICINAL_INLINE inline void dot_rows(const PackedRows<L>& rows, const int32_t* slots,
                                    const Channels& channels, const Store& store) {
  using V = Vector<typename L::Real>;
  constexpr int at_once = std::min(keys, kDotKeys<L, queries>);
  constexpr int in_group = std::min(at_once, L::kLanesPerHead);
  constexpr int n_groups = L::kLanesPerHead / in_group;  // in a vector of the result
  V sums[queries][keys / in_group];
  static_for<keys / at_once>([&](auto b) VICINAL_INLINE {
    V parts[queries][at_once];
    multiply_rows<at_once, size, queries>(rows, slots + b * at_once, channels, parts);
    static_for<queries>([&](auto q) VICINAL_INLINE {
      static_for<at_once / in_group>([&](auto i) VICINAL_INLINE {
        sums[q][b * (at_once / in_group) + i] =
            reduce_channels<L, in_group>(parts[q] + i * in_group);
      });
    });
  });
  static_for<queries>([&](auto q) VICINAL_INLINE {
    static_for<keys / L::kLanesPerHead>([&](auto i) VICINAL_INLINE {
      store(q, i, reduce_channels<L, n_groups, in_group>(sums[q] + i * n_groups));
    });
  });
}

// out[query][key, head] = dot(rows[slots[key]], vectors[query]), over channels. Reads slots and
// writes dot products up to the next multiple of kKeyUnroll keys.
template <typename L, int queries, typename Real = typename L::Real>
VICINAL_NOINLINE void gather_dot(const PackedRows<L>& rows, const int32_t* slots, int64_t count,
                                 PerQuery<const Vector<Real>, queries> vectors,
                                 PerQuery<Real, queries> out) {
  using V = Vector<Real>;
  constexpr int kKeys = std::max(kDotKeys<L, queries>, L::kLanesPerHead);
  static_assert(kKeyUnroll<L> % kKeys == 0);
  if (rows.vectors_per_row == 0)
    for (Real* dots : out) std::fill_n(dots, count * L::kHeads, Real(0));
  const auto add_block = [&](int64_t first, auto size) VICINAL_INLINE {
    const PackedRows<L> columns = rows.columns_from(first);
    V registers[size];  // of one query; those of two are loaded, each for several keys
    static_for<size>([&](auto j) VICINAL_INLINE { registers[j] = vectors[0][first + j]; });
    const auto channels = [&](auto q, int j) VICINAL_INLINE {
      if constexpr (queries == 1) return registers[j];
      else return vectors[q][first + j];
    };
    for (int64_t u = 0; u < count; u += kKeyUnroll<L>)
      static_for<kKeyUnroll<L> / kKeys>([&](auto b) VICINAL_INLINE {
        const int64_t key = u + b * kKeys;
        const auto store = [&](auto q, auto i, V partial) VICINAL_INLINE {
          auto* dots = reinterpret_cast<UnalignedVector<Real>*>(out[q] + key * L::kHeads) + i;
          *dots = first == 0 ? partial : V(*dots) + partial;
        };
        dot_rows<kKeys, size, queries>(columns, slots + key, channels, store);
      });
  };
  for_register_blocks<kDotBlock<L>>(rows.vectors_per_row, add_block);
}

// Calls body(weights, key, row) for every gathered row, with its weights broadcast per head.
template <typename L, int queries, typename Body>
VICINAL_INLINE inline void for_weighted_rows(PerQuery<const typename L::Real, queries> weights,
                                             const int32_t* slots, int64_t count,
                                             const PackedRows<L>& rows, const Body& body) {
  const auto call = [&](int64_t index, auto key, auto* row) VICINAL_INLINE {
    Vector<typename L::Real> factors[queries];
    static_for<queries>([&](auto q) VICINAL_INLINE {
      factors[q] = broadcast_heads<L>(weights[q] + index * L::kHeads);
    });
    body(factors, key, row);
  };
  int64_t u = 0;
  for (; u + kKeyUnroll<L> <= count; u += kKeyUnroll<L>)
    for_gathered_rows<kKeyUnroll<L>>(rows, slots + u, [&](auto key, auto* row) VICINAL_INLINE {
      call(u + key, key, row);
    });
  for (; u < count; ++u) call(u, std::integral_constant<int, 0>(), rows.row(slots[u]));
}

// acc[query] += sum over keys of weights[query][key] * rows[slots[key]]; acc: [vectors_per_row]. The
// keys are added one after another, so that the bits do not depend on which are shared.
template <typename L, int queries, typename Real = typename L::Real>
VICINAL_NOINLINE void gather_weighted_sum(PerQuery<const Real, queries> weights,
                                          const int32_t* slots, int64_t count,
                                          const PackedRows<L>& rows,
                                          PerQuery<Vector<Real>, queries> acc) {
  using V = Vector<Real>;
  constexpr int block = kSumBlock<L, queries>;
  for_register_blocks<block>(rows.vectors_per_row, [&](int64_t first, auto size) VICINAL_INLINE {
    const PackedRows<L> columns = rows.columns_from(first);
    V sums[queries][size];
    static_for<queries>([&](auto q) VICINAL_INLINE {
      static_for<size>([&](auto j) VICINAL_INLINE { sums[q][j] = acc[q][first + j]; });
    });
    const auto add = [&](const V* factors, auto, const V* row) VICINAL_INLINE {
      static_for<size>([&](auto j) VICINAL_INLINE {
        if constexpr (j % 8 == 0) keep_order_of_loads();
        const V x = load_once<queries>(row[j]);
        static_for<queries>([&](auto q) VICINAL_INLINE { sums[q][j] += factors[q] * x; });
      });
    };
    for_weighted_rows<L, queries>(weights, slots, count, columns, add);
    static_for<queries>([&](auto q) VICINAL_INLINE {
      static_for<size>([&](auto j) VICINAL_INLINE { acc[q][first + j] = sums[q][j]; });
    });
  });
}

// rows[slots[key]] += sum over queries of weights[query][key] * vectors[query], for every key;
// vectors: [vectors_per_row].
template <typename L, int queries, typename Real = typename L::Real>
VICINAL_NOINLINE void scatter_add_outer(PerQuery<const Real, queries> weights, const int32_t* slots,
                                        int64_t count,
                                        PerQuery<const Vector<Real>, queries> vectors,
                                        const PackedRows<L>& rows) {
  using V = Vector<Real>;
  constexpr int block = kSumBlock<L, queries>;
  for_register_blocks<block>(rows.vectors_per_row, [&](int64_t first, auto size) VICINAL_INLINE {
    const PackedRows<L> columns = rows.columns_from(first);
    V channels[queries][size];
    static_for<queries>([&](auto q) VICINAL_INLINE {
      static_for<size>([&](auto j) VICINAL_INLINE { channels[q][j] = vectors[q][first + j]; });
    });
    const auto add = [&](const V* factors, auto, V* row) VICINAL_INLINE {
      static_for<size>([&](auto j) VICINAL_INLINE {
        V sum = row[j];
        static_for<queries>([&](auto q) VICINAL_INLINE { sum += factors[q] * channels[q][j]; });
        row[j] = sum;
      });
    };
    for_weighted_rows<L, queries>(weights, slots, count, columns, add);
  });
}

// dot(a, b) over channels, broadcast per head; a, b: [vectors].
template <typename L, typename Real = typename L::Real>
inline Vector<Real> dot(const Vector<Real>* a, const Vector<Real>* b, int64_t vectors) {
  Vector<Real> sum{};
  for (int64_t j = 0; j < vectors; ++j) sum += a[j] * b[j];
  return reduce_lanes<L>(sum, plus);
}

// The number of vectors of [kLanesPerHead keys, kHeads heads] that hold `count` keys.
template <typename L>
int64_t n_vectors(int64_t count) {
  return (count + L::kLanesPerHead - 1) / L::kLanesPerHead;
}

// The sum of weights over keys, broadcast per head. The rest of the last vector must be zero.
template <typename L, typename Real = typename L::Real>
inline Vector<Real> sum_keys(const Vector<Real>* weights, int64_t count) {
  Vector<Real> sum{};
  for (int64_t b = 0; b < n_vectors<L>(count); ++b) sum += weights[b];
  return reduce_lanes<L>(sum, plus);
}

}  // namespace vicinal::VICINAL_ISA
