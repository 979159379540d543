// The products of which attention consists, for one instruction set: see cpu_vectors.h.
//
// Lanes are queries. "Rows" are of neighbors, one scalar at a time broadcast against all lanes;
// "columns" hold a channel of every lane.

namespace vicinal::VICINAL_ISA {

constexpr int kUnroll = 8;     // rows that an inner loop works on at a time
constexpr int kChannels = 16;  // sums over rows that it keeps in registers
constexpr int kBlock = 128;    // neighbors whose logits are held at a time; a multiple of kUnroll

inline int64_t padded(int64_t count) { return (count + kUnroll - 1) / kUnroll * kUnroll; }

// All ones in the lanes whose bit is set.
template <typename Real>
inline auto lane_mask(uint32_t lanes) {
  Bits<Real> bit;
  for (int lane = 0; lane < n_lanes<Real>; ++lane) bit[lane] = 1u << lane;
  return (bit & lanes) != 0;
}

// Neighbors are scattered over memory: their rows are asked for one step ahead.
template <typename Real>
inline void prefetch(const Real* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / sizeof(Real)) __builtin_prefetch(row + c);
}

// out[u] = sum over c of rows[u][c] * columns[c]; count is padded.
template <typename Real>
inline void multiply(const Real* const* rows, int64_t count, int64_t width,
                     const Vector<Real>* columns, Vector<Real>* out) {
  for (int64_t u = 0; u < count; u += kUnroll) {
    Vector<Real> sums[kUnroll] = {};
    const Real* row[kUnroll];
    for (int j = 0; j < kUnroll; ++j) row[j] = rows[u + j];
    if (u + kUnroll < count)
      for (int j = 0; j < kUnroll; ++j) prefetch(rows[u + kUnroll + j], width);
    for (int64_t c = 0; c < width; ++c) {
      const Vector<Real> column = columns[c];
#pragma GCC unroll 8
      for (int j = 0; j < kUnroll; ++j) sums[j] += row[j][c] * column;
    }
#pragma GCC unroll 8
    for (int j = 0; j < kUnroll; ++j) out[u + j] = sums[j];
  }
}

// out[c] += sum over u of weights[u] * rows[u][c], for kChannels channels from c on.
template <int kChannels, typename Real>
__attribute__((noinline)) void accumulate_channels(const Vector<Real>* weights,
                                                   const Real* const* rows, int64_t count,
                                                   int64_t c, Vector<Real>* out) {
  Vector<Real> sums[kChannels];
#pragma GCC unroll 16
  for (int j = 0; j < kChannels; ++j) sums[j] = out[c + j];
  for (int64_t u = 0; u < count; ++u) {
    const Vector<Real> weight = weights[u];
    const Real* row = rows[u] + c;
    __builtin_prefetch(rows[std::min(u + kUnroll, count - 1)] + c);
#pragma GCC unroll 16
    for (int j = 0; j < kChannels; ++j) sums[j] += row[j] * weight;
  }
#pragma GCC unroll 16
  for (int j = 0; j < kChannels; ++j) out[c + j] = sums[j];
}

template <typename Real>
inline void accumulate(const Vector<Real>* weights, const Real* const* rows, int64_t count,
                       int64_t width, Vector<Real>* out) {
  int64_t c = 0;
  for (; c + kChannels <= width; c += kChannels)
    accumulate_channels<kChannels>(weights, rows, count, c, out);
  for (; c < width; ++c) accumulate_channels<1>(weights, rows, count, c, out);
}

// The same where rows may hold what is not finite: zero times that is not zero, so lanes that do
// not see a row must be kept from it.
template <typename Real>
inline void accumulate_seen(const Vector<Real>* weights, const uint32_t* seers,
                            const Real* const* rows, int64_t count, int64_t width,
                            Vector<Real>* out) {
  for (int64_t u = 0; u < count; ++u)
    for (int64_t c = 0; c < width; ++c)
      out[c] += lane_mask<Real>(seers[u]) ? rows[u][c] * weights[u] : Vector<Real>{};
}

// Whether all lanes of all vectors are finite.
template <typename Real>
inline bool all_finite(const Vector<Real>* vectors, int64_t count) {
  Vector<Real> zeros{};
  for (int64_t index = 0; index < count; ++index) zeros += vectors[index] * 0;
  bool finite = true;
  for (int lane = 0; lane < n_lanes<Real>; ++lane) finite &= zeros[lane] == 0;
  return finite;
}

// out[j] = sum over lanes of weights[j][lane] * rows[lane], kUnroll sums of a vector of channels.
template <bool kFinite, typename Real>
inline void outer(const Vector<Real>* weights, const Real* rows, int64_t stride,
                  Vector<Real>* out) {
  const Real* scalars = reinterpret_cast<const Real*>(weights);
  Vector<Real> sums[kUnroll] = {};
#pragma GCC unroll 4
  for (int lane = 0; lane < n_lanes<Real>; ++lane) {
    const Vector<Real> row = load(rows + lane * stride);
#pragma GCC unroll 8
    for (int j = 0; j < kUnroll; ++j) {
      const Real weight = scalars[j * n_lanes<Real> + lane];
      if (kFinite || weight != 0) sums[j] += weight * row;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kUnroll; ++j) out[j] = sums[j];
}

// Adds the first `width` lanes of a vector to a row.
template <typename Real>
inline void add_to(Real* row, Vector<Real> sum, int64_t width) {
  if (width == n_lanes<Real>) {
    store<Real, Real>(row, load(row) + sum);
  } else {
    for (int64_t c = 0; c < width; ++c) row[c] += sum[c];
  }
}

// The lanes' rows from columns, one after another, with zeros up to the stride.
template <typename Real>
inline void columns_to_rows(const Vector<Real>* columns, int64_t width, Real* rows,
                            int64_t stride) {
  constexpr int kLanes = n_lanes<Real>;
  for (int64_t c = 0; c < stride; c += kLanes) {
    Vector<Real> block[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      block[lane] = c + lane < width ? columns[c + lane] : Vector<Real>{};
    transpose<Real>(block);
    for (int lane = 0; lane < kLanes; ++lane)
      store<Real, Real>(rows + lane * stride + c, block[lane]);
  }
}

}  // namespace vicinal::VICINAL_ISA
