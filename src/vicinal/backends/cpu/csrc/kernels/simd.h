// SIMD vectors, their elementary functions, and typed access to rows, for one instruction set.
// Vectors are GCC vector extensions of VICINAL_BYTES bytes. See kernels.h for how it is included.

namespace vicinal::VICINAL_ISA {

// A vector of Real, and one of unsigned integers (words) of the same size.
template <typename Real, typename Unsigned>
struct SimdTypes {
  typedef Real Vector __attribute__((vector_size(VICINAL_BYTES)));
  // The same at any address of a Real.
  typedef Real Unaligned
      __attribute__((vector_size(VICINAL_BYTES), aligned(sizeof(Real)), may_alias));
  typedef Unsigned Word;
  typedef Unsigned Words __attribute__((vector_size(VICINAL_BYTES)));
};

// Types, and constants of the elementary functions below.
template <typename Real>
struct Simd;
template <>
struct Simd<float> : SimdTypes<float, uint32_t> {
  static constexpr int mantissa_bits = 23, log_terms = 4, sincos_terms = 5;
  static constexpr float round_magic = 12582912.0f, exp_min = -87.0f, exponent_bias = 127;
  static constexpr float exp_series[] = {1, 1, 0.49999993f, 0.16666521f, 0.041668388f,
                                         0.0083687169f, 0.0013814599f};
  static constexpr float half_pi[] = {1.5703125f, 4.837512969970703e-4f, 7.549790126404332e-8f};
  static constexpr float max_angle = 8192;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Simd<double> : SimdTypes<double, uint64_t> {
  static constexpr int mantissa_bits = 52, log_terms = 10, sincos_terms = 8;
  static constexpr double round_magic = 6755399441055744.0, exp_min = -708.0, exponent_bias = 1023;
  static constexpr double exp_series[] = {1, 1, 0.50000000000000106271, 0.16666666666666412523,
                                          0.04166666666653015859, 0.0083333333334944616641,
                                          0.0013888888943630112946, 1.9841269506578687653e-4,
                                          2.4801493098906550659e-5, 2.7557586373840163694e-6,
                                          2.7630248379211443975e-7, 2.5000061602835666699e-8};
  static constexpr double half_pi[] = {1.570796325802803, 9.920935774287987e-10,
                                       2.2517417741562176e-18};
  static constexpr double max_angle = 8388608;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
};
template <typename Real>
using Vector = typename Simd<Real>::Vector;
template <typename Real>
using UnalignedVector = typename Simd<Real>::Unaligned;
template <typename Real>
using Words = typename Simd<Real>::Words;
template <typename Real>
constexpr int n_lanes = VICINAL_BYTES / sizeof(Real);

// The accumulator type for tensors of type T.
template <typename T>
struct Accumulator {
  typedef float type;
};
template <>
struct Accumulator<double> {
  typedef double type;
};

// Calls body(T()) with the C++ type T of a dtype.
template <typename Body>
inline void dispatch_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32: return body(float());
    case Dtype::float64: return body(double());
    case Dtype::float16: return body(torch::headeronly::Half());
    case Dtype::bfloat16: return body(torch::headeronly::BFloat16());
  }
}

// The channels of one head of a row: [width].
template <typename T>
inline T* row_ptr(const Rows& rows, int64_t id, int64_t head) {
  return static_cast<T*>(rows.data) + id * rows.row_stride + head * rows.head_stride;
}

// A permutation of the lanes of a and b: lane i of the result is lane source(i) of (a, b)
// concatenated.
template <typename Real, auto source, size_t... lane>
inline Vector<Real> shuffle_lanes(Vector<Real> a, Vector<Real> b, std::index_sequence<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source(int(lane))...);
#else
  return __builtin_shuffle(a, b, Words<Real>{typename Simd<Real>::Word(source(int(lane)))...});
#endif
}
template <typename Real, auto source>
inline Vector<Real> shuffle(Vector<Real> a, Vector<Real> b) {
  return shuffle_lanes<Real, source>(a, b, std::make_index_sequence<n_lanes<Real>>());
}

// exp(x) for x up to about 80. Range reduction to exp(x) = 2^n * exp(r), then the polynomial 1 + r +
// ... with the least maximum error for |r| up to log(2) / 2 (Remez algorithm): 3e-9, in float64
// 4e-18, below rounding errors. Results that would be subnormal are zero; NaN gives NaN.
template <typename Real>
VICINAL_INLINE inline Vector<Real> exponential(Vector<Real> x) {
  using S = Simd<Real>;
  constexpr Real magic = S::round_magic + S::exponent_bias;  // the low bits get n plus the bias
  constexpr Real ln2 = 0.69314718055994530942;  // one step errs no more than x was rounded
  const Vector<Real> shifted = x * Real(1.44269504088896340736) + magic;
  const Vector<Real> r = x - (shifted - magic) * ln2;
  Vector<Real> series{};
#pragma GCC unroll 13
  for (int term = std::size(S::exp_series) - 1; term >= 0; --term)
    series = series * r + S::exp_series[term];
  const auto power = (Vector<Real>)((Words<Real>)shifted << S::mantissa_bits);
  return x < S::exp_min ? Vector<Real>{} : series * power;
}

// log(x) for finite x of at least 1. Range reduction to log(x) = n * log(2) + log(m) with m from
// 1 / sqrt(2) to sqrt(2), then the series log(m) = 2 * (s + s^3 / 3 + s^5 / 5 + ...) up to rounding
// error, with s = (m - 1) / (m + 1). NaN gives NaN.
template <typename Real>
inline Vector<Real> logarithm(Vector<Real> x) {
  using S = Simd<Real>;
  using W = Words<Real>;
  const W one = (W)(Vector<Real>{} + Real(1));
  const W sqrt_half = (W)(Vector<Real>{} + Real(0.70710678118654752440));
  // Adding the difference carries into the exponent where the mantissa is above that of sqrt(2).
  const W shifted = (W)x + (one - sqrt_half);
  const W mantissa = shifted & ((typename S::Word(1) << S::mantissa_bits) - 1);
  const Vector<Real> m = (Vector<Real>)(mantissa + sqrt_half);
  const Vector<Real> n =
      (Vector<Real>)((shifted >> S::mantissa_bits) + (W)(Vector<Real>{} + S::round_magic)) -
      (S::round_magic + S::exponent_bias);
  const Vector<Real> s = (m - 1) / (m + 1), square = s * s;
  Vector<Real> series{};
#pragma GCC unroll 13
  for (int term = S::log_terms; term >= 0; --term)
    series = series * square + Real(2) / (2 * term + 1);
  const Vector<Real> log = n * S::ln2_high + (n * S::ln2_low + s * series);
  return x == x ? log : x;
}

// The 32-bit finalizer (fmix32) of Austin Appleby's MurmurHash3; wider lanes hold 32-bit values.
template <typename Unsigned>
inline Unsigned hash32(Unsigned x) {
  x = ((x ^ (x >> 16)) * 0x85EBCA6Bu) & 0xFFFFFFFFu;
  x = ((x ^ (x >> 13)) * 0xC2B2AE35u) & 0xFFFFFFFFu;
  return x ^ (x >> 16);
}

// cos(x) and sin(x). Cody-Waite reduction to a quadrant in three exact steps, then Taylor series.
// If an angle is too large for that reduction, the C library computes all lanes.
template <typename Real>
inline void cosine_and_sine(Vector<Real> x, Vector<Real>& cosine, Vector<Real>& sine) {
  using S = Simd<Real>;
  using V = Vector<Real>;
  using W = Words<Real>;
  bool reducible = true;
  for (int lane = 0; lane < n_lanes<Real>; ++lane)
    reducible &= x[lane] < S::max_angle && x[lane] > -S::max_angle;
  if (!reducible) {
    for (int lane = 0; lane < n_lanes<Real>; ++lane) {
      cosine[lane] = std::cos(x[lane]);
      sine[lane] = std::sin(x[lane]);
    }
    return;
  }
  const V shifted = x * Real(0.63661977236758134308) + S::round_magic;
  const V n = shifted - S::round_magic;
  V r = x;
  for (Real part : S::half_pi) r -= n * part;
  const V square = r * r;
  V even = V{} + Real(1), odd = V{} + Real(1);
#pragma GCC unroll 8
  for (int term = S::sincos_terms; term > 0; --term) {
    even = Real(1) - even * square * (Real(1) / ((2 * term - 1) * (2 * term)));
    odd = Real(1) - odd * square * (Real(1) / ((2 * term) * (2 * term + 1)));
  }
  odd *= r;
  const W quadrant = (W)shifted;
  const auto swap = (quadrant & 1) != 0;
  const V c = swap ? odd : even, s = swap ? even : odd;
  cosine = ((quadrant + 1) & 2) != 0 ? -c : c;
  sine = (quadrant & 2) != 0 ? -s : s;
}

}  // namespace vicinal::VICINAL_ISA
