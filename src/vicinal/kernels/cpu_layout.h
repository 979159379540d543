// How rows stand while attention works on them, for one instruction set: see cpu_vectors.h.

namespace vicinal::VICINAL_ISA {

// A vector holds a span of channels of each of kHeads heads. Sums over channels then run down the
// vectors of a row, and what is left to sum across lanes are spans, for as many keys at once.
template <typename Number, int kHeadsPerVector>
struct Layout {
  using Real = Number;
  static constexpr int kHeads = kHeadsPerVector;
  static constexpr int kLanes = n_lanes<Real>, kSpan = kLanes / kHeads;

  static int64_t vectors(int64_t width) { return (width + kSpan - 1) / kSpan; }
};

// Channels of one head that stand side by side, at any address.
template <typename L>
struct Span {
  typedef typename L::Real type
      __attribute__((vector_size(L::kSpan * sizeof(typename L::Real)),
                     aligned(alignof(typename L::Real)), may_alias));
};

template <typename L, typename T>
inline typename Span<L>::type load_span(const T* from) {
  if constexpr (std::is_same_v<T, typename L::Real>) {
    return *reinterpret_cast<const typename Span<L>::type*>(from);
  } else {
    typename Span<L>::type span;
    for (int s = 0; s < L::kSpan; ++s) span[s] = from[s];
    return span;
  }
}
template <typename L, typename T>
inline void store_span(T* to, typename Span<L>::type span) {
  if constexpr (std::is_same_v<T, typename L::Real>) {
    *reinterpret_cast<typename Span<L>::type*>(to) = span;
  } else {
    for (int s = 0; s < L::kSpan; ++s) to[s] = T(span[s]);
  }
}

// Calls whole(at, channels) for every span of a row, which stands at scalar `at` of its packed
// form, and part(at, channels, count) for what is left.
template <typename L, typename T, typename Whole, typename Part>
inline void for_spans(const Rows& rows, int64_t id, int64_t head, const Whole& whole,
                      const Part& part) {
#pragma GCC unroll 4
  for (int g = 0; g < L::kHeads; ++g) {
    T* row = row_of<T>(rows, id, head + g);
    int64_t at = g * L::kSpan, c = 0;
    for (; c + L::kSpan <= rows.width; c += L::kSpan, at += L::kLanes) whole(at, row + c);
    if (c < rows.width) part(at, row + c, rows.width - c);
  }
}

// Asks for the heads from `head` on of a row, which may be anywhere in memory, before they are
// needed. GCC takes a function that only does this for one without effect, and drops it, unless it
// is inlined early.
template <typename L>
__attribute__((always_inline)) inline void prefetch(const Rows& rows, int64_t id, int64_t head) {
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
  Real* scalars = reinterpret_cast<Real*>(packed);
  if (rows.width % L::kSpan) packed[L::vectors(rows.width) - 1] = Vector<Real>{};
  for_spans<L, T>(
      rows, id, head,
      [&](int64_t at, const T* from) { store_span<L>(scalars + at, load_span<L>(from) * scale); },
      [&](int64_t at, const T* from, int64_t count) {
        for (int64_t s = 0; s < count; ++s) scalars[at + s] = Real(from[s]) * scale;
      });
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

// The way back, times `scale`.
template <typename L>
inline void unpack(const Vector<typename L::Real>* packed, double scale, const Rows& rows,
                   int64_t id, int64_t head) {
  using Real = typename L::Real;
  const Real* scalars = reinterpret_cast<const Real*>(packed);
  with_storage(rows.storage, [&](auto type) {
    for_spans<L, decltype(type)>(
        rows, id, head,
        [&](int64_t at, auto* to) {
          store_span<L>(to, load_span<L>(scalars + at) * Real(scale));
        },
        [&](int64_t at, auto* to, int64_t count) {
          for (int64_t s = 0; s < count; ++s) to[s] = decltype(type)(scalars[at + s] * Real(scale));
        });
  });
}

// Adds a packed row to one of sums, or is the first that it gets.
template <typename L>
inline void add(const Vector<typename L::Real>* packed, const Rows& rows, int64_t id, int64_t head,
                bool first = false) {
  using Real = typename L::Real;
  const Real* scalars = reinterpret_cast<const Real*>(packed);
  for_spans<L, Real>(
      rows, id, head,
      [&](int64_t at, Real* to) {
        const auto span = load_span<L>(scalars + at);
        store_span<L>(to, first ? span : load_span<L>(to) + span);
      },
      [&](int64_t at, Real* to, int64_t count) {
        for (int64_t s = 0; s < count; ++s)
          to[s] = first ? scalars[at + s] : to[s] + scalars[at + s];
      });
}

// Lane by lane the vector whose lanes (head, channel) have (head, key) instead: of each of kSpan
// keys, whose products with a query stand in `parts`, the sum over its channels. In log2(kSpan)
// steps, each of which adds neighbors of two vectors and keeps the sums of both in one.
template <typename L>
inline Vector<typename L::Real> sum_across(Vector<typename L::Real>* parts) {
  using Real = typename L::Real;
  [&]<int... bit>(std::integer_sequence<int, bit...>) {
    ([&] {
      constexpr int step = 1 << bit;
      if constexpr (step < L::kSpan) {
        constexpr auto kept = [](int lane) { return lane & step ? L::kLanes + lane : lane; };
        constexpr auto moved = [](int lane) {
          return lane & step ? L::kLanes + lane - step : lane + step;
        };
#pragma GCC unroll 16
        for (int key = 0; key < L::kSpan; key += 2 * step)
          parts[key] = shuffle<Real, kept>(parts[key], parts[key + step]) +
                       shuffle<Real, moved>(parts[key], parts[key + step]);
      }
    }(), ...);
  }(std::make_integer_sequence<int, 4>());
  return parts[0];
}

constexpr auto plus = [](auto a, auto b) { return a + b; };

// Joins the lanes of each head: all of them hold the result.
template <typename L, typename Join>
inline Vector<typename L::Real> fold(Vector<typename L::Real> x, const Join& join) {
  using Real = typename L::Real;
  [&]<int... bit>(std::integer_sequence<int, bit...>) {
    ([&] {
      constexpr int step = 1 << bit;
      if constexpr (step < L::kSpan) {
        constexpr auto other = [](int lane) { return lane ^ step; };
        x = join(x, shuffle<Real, other>(x, x));
      }
    }(), ...);
  }(std::make_integer_sequence<int, 4>());
  return x;
}

// In all lanes of each head, that of the `key`-th key.
template <typename L, int key>
inline Vector<typename L::Real> spread(Vector<typename L::Real> x) {
  constexpr auto source = [](int lane) { return lane / L::kSpan * L::kSpan + key; };
  return shuffle<typename L::Real, source>(x, x);
}

// In all lanes of each head its number.
template <typename L>
inline Vector<typename L::Real> per_head(const typename L::Real* numbers) {
  Vector<typename L::Real> out;
#pragma GCC unroll 16
  for (int lane = 0; lane < L::kLanes; ++lane) out[lane] = numbers[lane / L::kSpan];
  return out;
}

// Lane by lane, whether the key it stands for is one of the first `count`.
template <typename L>
inline auto first_keys(int64_t count) {
  Bits<typename L::Real> key;
  for (int lane = 0; lane < L::kLanes; ++lane) key[lane] = lane % L::kSpan;
  using Bit = typename Lanes<typename L::Real>::Bit;
  return key < Bit(std::clamp<int64_t>(count, 0, L::kSpan));
}

}  // namespace vicinal::VICINAL_ISA
