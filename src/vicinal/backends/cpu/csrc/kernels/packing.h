// Packed rows: several heads interleaved in SIMD vectors, in the accumulator type. Conversion from
// and to tensors, and reductions and broadcasts over lanes. See kernels.h for how it is included.

namespace vicinal::VICINAL_ISA {

// The memory layout of a packed row: [vectors_per_row, kLanesPerHead channels, kHeads heads],
// zero-padded. Heads are interleaved: channel 0 of every head, channel 1 of every head, ...
//
// A dot product over channels adds up the vectors of a row and ends in one reduction over
// kLanesPerHead lanes, which reduce_channels does for kLanesPerHead keys at once. Its result, a
// vector of [kLanesPerHead keys, kHeads heads], is the layout of logits and probabilities.
template <typename Accumulator, int kHeadsPerVector>
struct PackedLayout {
  using Real = Accumulator;
  static constexpr int kHeads = kHeadsPerVector;
  static constexpr int kLanes = n_lanes<Real>, kLanesPerHead = kLanes / kHeads;

  static int64_t vectors_per_row(int64_t width) {
    return (width + kLanesPerHead - 1) / kLanesPerHead;
  }
};

// The most bytes of a packed row of several heads. Of longer rows, the keys of the queries that are
// processed together (kQueryBlock) would not fit in L1.
constexpr int64_t kRowBytes = 256;

// A fully unrolled loop: calls body with the compile-time constants 0, 1, ..., count - 1.
template <int count, typename Body>
VICINAL_INLINE inline void static_for(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) VICINAL_INLINE {
    (body(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, count>());
}

// A matrix of packed rows: [slots, vectors_per_row].
template <typename L>
struct PackedRows {
  using V = Vector<typename L::Real>;

  V* data;
  int64_t vectors_per_row;

  // The address is computed in bytes: in units of V, it would cost one more shift per row.
  V* row(int64_t slot) const {
    const int64_t bytes = vectors_per_row * sizeof(V);
    return reinterpret_cast<V*>(reinterpret_cast<char*>(data) + slot * bytes);
  }
  // The columns from vector `first` on: [slots, vectors_per_row - first].
  PackedRows columns_from(int64_t first) const { return {data + first, vectors_per_row}; }
};

// Prefetches kHeads heads of a row, from `head` on. GCC considers a function that only prefetches
// free of side effects and drops calls to it, unless it is inlined early.
template <typename L>
VICINAL_INLINE inline void prefetch(const Rows& rows, int64_t id, int64_t head) {
  const bool half = rows.dtype == Dtype::float16 || rows.dtype == Dtype::bfloat16;
  const int64_t size = rows.dtype == Dtype::float64 ? 8 : half ? 2 : 4;
  const char* row = static_cast<const char*>(rows.data) +
                    (id * rows.row_stride + head * rows.head_stride) * size;
  for (int g = 0; g < L::kHeads; ++g, row += rows.head_stride * size)
    for (int64_t byte = 0; byte < rows.width * size; byte += 64)
      __builtin_prefetch(row + byte, 0, 2);
}

// to[kHeads * i + g] = scale * from[g * stride + i] for i < kLanes: interleaves a vector per head.
template <typename L, typename Real = typename L::Real>
VICINAL_INLINE inline void pack_vectors(const Real* from, int64_t stride, Real scale,
                                        Vector<Real>* to) {
  constexpr auto low = [](int lane) { return lane / 2 + lane % 2 * L::kLanes; };
  constexpr auto high = [](int lane) { return (L::kLanes + lane) / 2 + lane % 2 * L::kLanes; };
  const auto load = [&](int g) {
    return Vector<Real>(*reinterpret_cast<const UnalignedVector<Real>*>(from + g * stride)) * scale;
  };
  if constexpr (L::kHeads == 1) {
    to[0] = load(0);
  } else if constexpr (L::kHeads == 2) {
    const Vector<Real> a = load(0), b = load(1);
    to[0] = shuffle<Real, low>(a, b);
    to[1] = shuffle<Real, high>(a, b);
  } else {
    const Vector<Real> a = load(0), b = load(1), c = load(2), d = load(3);
    const Vector<Real> ac[] = {shuffle<Real, low>(a, c), shuffle<Real, high>(a, c)};
    const Vector<Real> bd[] = {shuffle<Real, low>(b, d), shuffle<Real, high>(b, d)};
    static_for<4>([&](auto i) VICINAL_INLINE {
      to[i] = i % 2 ? shuffle<Real, high>(ac[i / 2], bd[i / 2])
                    : shuffle<Real, low>(ac[i / 2], bd[i / 2]);
    });
  }
}

template <typename L, typename T>
inline void pack_row_as(const Rows& rows, int64_t id, int64_t head, typename L::Real scale,
                        Vector<typename L::Real>* packed) {
  using Real = typename L::Real;
  const T* __restrict from = row_ptr<T>(rows, id, head);
  const int64_t width = rows.width, stride = rows.head_stride;
  if constexpr (std::is_same_v<T, Real>)
    if (width % L::kLanes == 0) {
      for (int64_t c = 0; c < width; c += L::kLanes)
        pack_vectors<L>(from + c, stride, scale, packed + c / L::kLanes * L::kHeads);
      return;
    }
  Real* __restrict to = reinterpret_cast<Real*>(packed);
  for (int64_t c = 0; c < width; ++c)
    for (int g = 0; g < L::kHeads; ++g) to[c * L::kHeads + g] = Real(from[g * stride + c]) * scale;
  const int64_t end = L::vectors_per_row(width) * L::kLanes;
  for (int64_t i = width * L::kHeads; i < end; ++i) to[i] = 0;
}

// packed = scale * rows[id, head : head + kHeads], zero-padded.
template <typename L>
VICINAL_NOINLINE void pack_row(const Rows& rows, int64_t id, int64_t head, double scale,
                               Vector<typename L::Real>* packed) {
  dispatch_dtype(rows.dtype, [&](auto type) {
    pack_row_as<L, decltype(type)>(rows, id, head, scale, packed);
  });
}

// Gathers and packs rows: packed[i] = rows[ids[i], head : head + kHeads], for i < count.
template <typename L>
VICINAL_NOINLINE void pack_rows(const Rows& rows, const int32_t* ids, int64_t count, int64_t head,
                                Vector<typename L::Real>* packed) {
  dispatch_dtype(rows.dtype, [&](auto type) {
    const Rows local = rows;  // a copy, which cannot alias the stores
    const int64_t vectors = L::vectors_per_row(local.width);
    for (int64_t i = 0; i < count; ++i)
      pack_row_as<L, decltype(type)>(local, ids[i], head, 1, packed + i * vectors);
  });
}

// Calls op(element of rows[id, head : head + kHeads], packed element) for every channel.
template <typename L, typename T, typename Op>
inline void for_unpacked(const Vector<typename L::Real>* packed, const Rows& rows, int64_t id,
                         int64_t head, const Op& op) {
  T* __restrict to = row_ptr<T>(rows, id, head);
  const auto* __restrict from = reinterpret_cast<const typename L::Real*>(packed);
  const int64_t width = rows.width, stride = rows.head_stride;
  for (int64_t c = 0; c < width; ++c)
    for (int g = 0; g < L::kHeads; ++g) op(to[g * stride + c], from[c * L::kHeads + g]);
}

// rows[id, head : head + kHeads] = scale * packed.
template <typename L>
VICINAL_NOINLINE void unpack_row(const Vector<typename L::Real>* packed, double scale,
                                 const Rows& rows, int64_t id, int64_t head) {
  using Real = typename L::Real;
  dispatch_dtype(rows.dtype, [&](auto type) {
    using T = decltype(type);
    const Real factor = scale;
    for_unpacked<L, T>(packed, rows, id, head, [=](T& to, Real x) { to = T(x * factor); });
  });
}

// rows[id, head : head + kHeads] += packed, for rows of the accumulator dtype; `overwrite` assigns
// instead, which initializes the row.
template <typename L>
VICINAL_NOINLINE void add_row(const Vector<typename L::Real>* packed, const Rows& rows, int64_t id,
                              int64_t head, bool overwrite = false) {
  using Real = typename L::Real;
  if (overwrite) for_unpacked<L, Real>(packed, rows, id, head, [](Real& to, Real x) { to = x; });
  else for_unpacked<L, Real>(packed, rows, id, head, [](Real& to, Real x) { to += x; });
}

constexpr int log2_of(int x) { return x > 1 ? 1 + log2_of(x / 2) : 0; }

// The source lane of one operand of a pairwise addition; see pairwise_add.
template <int lanes, int unit, int group>
constexpr int pair_lane(int lane, bool odd) {
  const int within = lane % (group / 2), first = lane / group * group;
  const int vector = lane % group < group / 2 ? 0 : lanes;
  return vector + first + (within / unit * 2 + odd) * unit + within % unit;
}

// Horizontal addition of adjacent pairs of units (`unit` lanes each) within each group of `group`
// lanes: the first half of a group holds the sums from a, the second half those from b.
template <typename Real, int unit, int group>
inline Vector<Real> pairwise_add(Vector<Real> a, Vector<Real> b) {
  constexpr auto even = [](int lane) { return pair_lane<n_lanes<Real>, unit, group>(lane, false); };
  constexpr auto odd = [](int lane) { return pair_lane<n_lanes<Real>, unit, group>(lane, true); };
  return shuffle<Real, even>(a, b) + shuffle<Real, odd>(a, b);
}

// Sums over the channels of keys. parts: [keys], vectors of [kLanesPerHead channels, kHeads heads].
// With keys = kLanesPerHead the result is [kLanesPerHead keys, kHeads heads]. With fewer it is such
// a part itself, of so many keys that are `summed` already: these are put together as keys are.
// Additions within 128-bit groups come first, since shuffles within those are the cheapest.
template <typename L, int keys, int summed = 1>
VICINAL_INLINE inline Vector<typename L::Real> reduce_channels(Vector<typename L::Real>* parts) {
  using Real = typename L::Real;
  constexpr int group = std::max(L::kHeads, std::min(L::kLanes, int(16 / sizeof(Real))));
  constexpr int inner_steps = log2_of(group / L::kHeads) - log2_of(summed);
  static_for<log2_of(keys)>([&](auto step) VICINAL_INLINE {
    constexpr bool inner = step < inner_steps;
    static_for<(keys >> step) / 2>([&](auto key) VICINAL_INLINE {
      parts[key] = pairwise_add<Real, inner ? L::kHeads : group, inner ? group : L::kLanes>(
          parts[2 * key], parts[2 * key + 1]);
    });
  });
  return parts[0];
}

constexpr auto plus = [](auto a, auto b) { return a + b; };

// A butterfly reduction over the lanes of each head. Every lane of a head holds the result.
template <typename L, typename Op>
inline Vector<typename L::Real> reduce_lanes(Vector<typename L::Real> x, const Op& op) {
  static_for<log2_of(L::kLanesPerHead)>([&](auto step) VICINAL_INLINE {
    constexpr int distance = L::kHeads << step;
    constexpr auto other = [](int lane) { return lane ^ distance; };
    x = op(x, shuffle<typename L::Real, other>(x, x));
  });
  return x;
}

// Broadcasts values [kHeads] to all lanes of their heads.
template <typename L>
inline Vector<typename L::Real> broadcast_heads(const typename L::Real* values) {
  using Real = typename L::Real;
  constexpr int bytes = L::kHeads * sizeof(Real);
  if constexpr (bytes <= 8) {  // a single load
    using Word = std::conditional_t<bytes == 8, uint64_t, uint32_t>;
    typedef Word Repeated __attribute__((vector_size(VICINAL_BYTES)));
    typedef Word Unaligned __attribute__((aligned(4), may_alias));
    return (Vector<Real>)(Repeated{} + *reinterpret_cast<const Unaligned*>(values));
  } else if constexpr (L::kHeads == L::kLanes) {
    return Vector<Real>(*reinterpret_cast<const UnalignedVector<Real>*>(values));
  } else {
    Vector<Real> out;
#pragma GCC unroll 16
    for (int lane = 0; lane < L::kLanes; ++lane) out[lane] = values[lane % L::kHeads];
    return out;
  }
}

// A lane mask for a vector of [kLanesPerHead keys, kHeads heads]: true for the first `count` keys.
template <typename L>
inline auto key_mask(int64_t count) {
  Words<typename L::Real> key;
  for (int lane = 0; lane < L::kLanes; ++lane) key[lane] = lane / L::kHeads;
  using Word = typename Simd<typename L::Real>::Word;
  return key < Word(std::clamp<int64_t>(count, 0, L::kLanesPerHead));
}

}  // namespace vicinal::VICINAL_ISA
