// How rows stand while attention works on them, for one instruction set: see vectors.h.

namespace vicinal::VICINAL_ISA {

// Packed, the channels of kHeads heads take turns: channel 0 of each, channel 1 of each, ...
// A vector holds a span of channels. Sums over channels then run down the vectors of a row, and
// what is left to sum across lanes are spans, for as many keys at once; and what belongs to a key,
// a number for each head, stands side by side as well.
template <typename Number, int kHeadsPerVector>
struct Layout {
  using Real = Number;
  static constexpr int kHeads = kHeadsPerVector;
  static constexpr int kLanes = n_lanes<Real>, kSpan = kLanes / kHeads;

  static int64_t vectors(int64_t width) { return (width + kSpan - 1) / kSpan; }
};

// Asks for the heads from `head` on of a row, which may be anywhere in memory, before they are
// needed. GCC takes a function that only does this for one without effect, and drops it, unless it
// is inlined early.
template <typename L>
VICINAL_INLINE inline void prefetch(const Rows& rows, int64_t id, int64_t head) {
  const bool half = rows.storage == Storage::float16 || rows.storage == Storage::bfloat16;
  const int64_t size = rows.storage == Storage::float64 ? 8 : half ? 2 : 4;
  const char* row = static_cast<const char*>(rows.data) +
                    (id * rows.row_stride + head * rows.head_stride) * size;
  for (int g = 0; g < L::kHeads; ++g, row += rows.head_stride * size)
    for (int64_t byte = 0; byte < rows.width * size; byte += 64)
      __builtin_prefetch(row + byte, 0, 2);
}

template <typename L, typename T>
inline void pack_row(const Rows& rows, int64_t id, int64_t head, typename L::Real scale,
                     Vector<typename L::Real>* packed) {
  using Real = typename L::Real;
  const T* __restrict from = row_of<T>(rows, id, head);
  const int64_t width = rows.width, stride = rows.head_stride;
  Real* __restrict to = reinterpret_cast<Real*>(packed);
  for (int64_t c = 0; c < width; ++c)
    for (int g = 0; g < L::kHeads; ++g) to[c * L::kHeads + g] = Real(from[g * stride + c]) * scale;
  for (int64_t at = width * L::kHeads; at < L::vectors(width) * L::kLanes; ++at) to[at] = 0;
}

// The channels of heads `head`, `head + 1`, ... of a row, times `scale`, zero where there is none.
template <typename L>
inline void pack(const Rows& rows, int64_t id, int64_t head, double scale,
                 Vector<typename L::Real>* packed) {
  with_storage(rows.storage, [&](auto type) {
    pack_row<L, decltype(type)>(rows, id, head, scale, packed);
  });
}

// Those of many rows.
template <typename L>
inline void pack_all(const Rows& rows, const int32_t* ids, int64_t count, int64_t head,
                     Vector<typename L::Real>* packed) {
  with_storage(rows.storage, [&](auto type) {
    const Rows local = rows;  // which no store can reach
    const int64_t vectors = L::vectors(local.width);
    for (int64_t i = 0; i < count; ++i)
      pack_row<L, decltype(type)>(local, ids[i], head, 1, packed + i * vectors);
  });
}

// The way back: calls join(number, packed number) for all channels of some heads of a row.
template <typename L, typename T, typename Join>
inline void for_row(const Vector<typename L::Real>* packed, const Rows& rows, int64_t id,
                    int64_t head, const Join& join) {
  T* __restrict to = row_of<T>(rows, id, head);
  const auto* __restrict from = reinterpret_cast<const typename L::Real*>(packed);
  const int64_t width = rows.width, stride = rows.head_stride;
  for (int64_t c = 0; c < width; ++c)
    for (int g = 0; g < L::kHeads; ++g) join(to[g * stride + c], from[c * L::kHeads + g]);
}

// Sets a row to a packed one times `scale`.
template <typename L>
inline void unpack(const Vector<typename L::Real>* packed, double scale, const Rows& rows,
                   int64_t id, int64_t head) {
  using Real = typename L::Real;
  with_storage(rows.storage, [&](auto type) {
    using T = decltype(type);
    const Real factor = scale;
    for_row<L, T>(packed, rows, id, head, [=](T& to, Real x) { to = T(x * factor); });
  });
}

// Adds a packed row to one of sums, or is the first that it gets.
template <typename L>
inline void add(const Vector<typename L::Real>* packed, const Rows& rows, int64_t id, int64_t head,
                bool first = false) {
  using Real = typename L::Real;
  if (first) for_row<L, Real>(packed, rows, id, head, [](Real& to, Real x) { to = x; });
  else for_row<L, Real>(packed, rows, id, head, [](Real& to, Real x) { to += x; });
}

// Calls body with 0, 1, ... up to `count` as constants.
template <int count, typename Body>
VICINAL_INLINE inline void for_constants(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) VICINAL_INLINE {
    (body(std::integral_constant<int, i>()), ...);
  }(std::make_integer_sequence<int, count>());
}

constexpr int log2_of(int x) { return x > 1 ? 1 + log2_of(x / 2) : 0; }

// Where the lanes of a sum of neighbors come from, the even ones of each pair and the odd ones.
template <int lanes, int unit, int group>
constexpr int neighbor(int lane, bool odd) {
  const int within = lane % (group / 2), first = lane / group * group;
  const int vector = lane % group < group / 2 ? 0 : lanes;
  return vector + first + (within / unit * 2 + odd) * unit + within % unit;
}

// In units of `unit` lanes, the sums of neighbors in each group of lanes: those of a, then of b.
template <typename Real, int unit, int group>
inline Vector<Real> sum_neighbors(Vector<Real> a, Vector<Real> b) {
  constexpr auto even = [](int lane) { return neighbor<n_lanes<Real>, unit, group>(lane, false); };
  constexpr auto odd = [](int lane) { return neighbor<n_lanes<Real>, unit, group>(lane, true); };
  return shuffle<Real, even>(a, b) + shuffle<Real, odd>(a, b);
}

// Of each of kSpan keys, whose products with a query stand in `parts`, the sum over its channels:
// lanes (channel, head) become lanes (key, head). First within groups of 16 bytes, which is what
// processors are best at, then among these.
template <typename L>
VICINAL_INLINE inline Vector<typename L::Real> sum_across(Vector<typename L::Real>* parts) {
  using Real = typename L::Real;
  constexpr int group = std::max(L::kHeads, std::min(L::kLanes, int(16 / sizeof(Real))));
  constexpr int within = log2_of(group / L::kHeads), levels = log2_of(L::kSpan);
  for_constants<levels>([&](auto level) VICINAL_INLINE {
    constexpr bool inside = level < within;
    for_constants<(L::kSpan >> level) / 2>([&](auto key) VICINAL_INLINE {
      parts[key] = sum_neighbors<Real, inside ? L::kHeads : group, inside ? group : L::kLanes>(
          parts[2 * key], parts[2 * key + 1]);
    });
  });
  return parts[0];
}

constexpr auto plus = [](auto a, auto b) { return a + b; };

// Joins the lanes of each head: all of them hold the result.
template <typename L, typename Join>
inline Vector<typename L::Real> fold(Vector<typename L::Real> x, const Join& join) {
  for_constants<log2_of(L::kSpan)>([&](auto level) VICINAL_INLINE {
    constexpr int step = L::kHeads << level;
    constexpr auto other = [](int lane) { return lane ^ step; };
    x = join(x, shuffle<typename L::Real, other>(x, x));
  });
  return x;
}

// A number for each head, in all of its lanes.
template <typename L>
inline Vector<typename L::Real> per_head(const typename L::Real* numbers) {
  using Real = typename L::Real;
  typedef uint64_t Pairs __attribute__((vector_size(VICINAL_BYTES)));
  typedef uint64_t Pair __attribute__((aligned(4), may_alias));
  if constexpr (L::kHeads == 1) {
    return Vector<Real>{} + *numbers;
  } else if constexpr (L::kHeads * sizeof(Real) == sizeof(Pair)) {  // one load
    return (Vector<Real>)(Pairs{} + *reinterpret_cast<const Pair*>(numbers));
  } else {
    Vector<Real> out;
#pragma GCC unroll 16
    for (int lane = 0; lane < L::kLanes; ++lane) out[lane] = numbers[lane % L::kHeads];
    return out;
  }
}

// Lane by lane, whether the key it stands for is one of the first `count`.
template <typename L>
inline auto first_keys(int64_t count) {
  Bits<typename L::Real> key;
  for (int lane = 0; lane < L::kLanes; ++lane) key[lane] = lane / L::kHeads;
  using Bit = typename Lanes<typename L::Real>::Bit;
  return key < Bit(std::clamp<int64_t>(count, 0, L::kSpan));
}

}  // namespace vicinal::VICINAL_ISA
