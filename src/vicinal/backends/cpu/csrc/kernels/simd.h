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
  static constexpr int mantissa_bits = 23, log_terms = 4;
  static constexpr float round_magic = 12582912.0f, exp_min = -87.0f, exponent_bias = 127;
  static constexpr float exp_series[] = {1, 1, 0.49999993f, 0.16666521f, 0.041668388f,
                                         0.0083687169f, 0.0013814599f};
  static constexpr float cos_series[] = {1, -0.5f, 0.041666647f, -0.0013887367f, 2.4438378e-5f};
  static constexpr float sin_series[] = {1, -0.16666655f, 0.0083321777f, -1.9517235e-4f};
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Simd<double> : SimdTypes<double, uint64_t> {
  static constexpr int mantissa_bits = 52, log_terms = 10;
  static constexpr double round_magic = 6755399441055744.0, exp_min = -708.0, exponent_bias = 1023;
  static constexpr double exp_series[] = {1, 1, 0.50000000000000106271, 0.16666666666666412523,
                                          0.04166666666653015859, 0.0083333333334944616641,
                                          0.0013888888943630112946, 1.9841269506578687653e-4,
                                          2.4801493098906550659e-5, 2.7557586373840163694e-6,
                                          2.7630248379211443975e-7, 2.5000061602835666699e-8};
  static constexpr double cos_series[] = {1, -0.5, 0.041666666666666599476,
                                          -0.0013888888888874123927, 2.480158728948218021e-5,
                                          -2.7557314352330632364e-7, 2.0875723272847939542e-9,
                                          -1.1359647780471112345e-11};
  static constexpr double sin_series[] = {1, -0.16666666666666632027, 0.0083333333333224136423,
                                          -1.9841269829807808276e-4, 2.7557313691917648321e-6,
                                          -2.5050758115155569261e-8, 1.5896795644727749659e-10};
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

// series[0] + series[1] * x + series[2] * x^2 + ...
template <typename Real, size_t terms>
VICINAL_INLINE inline Vector<Real> polynomial(const Real (&series)[terms], Vector<Real> x) {
  Vector<Real> sum = Vector<Real>{} + series[terms - 1];
#pragma GCC unroll 16
  for (int term = terms - 2; term >= 0; --term) sum = sum * x + series[term];
  return sum;
}

// exp(x) for x up to about 80. Range reduction to exp(x) = 2^n * exp(r), then a minimax polynomial
// 1 + r + ... for |r| up to log(2) / 2 (Remez algorithm): its error is 5e-9, in float64 1e-17, below
// rounding errors. Results that would be subnormal are zero; NaN gives NaN.
template <typename Real>
VICINAL_INLINE inline Vector<Real> exponential(Vector<Real> x) {
  using S = Simd<Real>;
  constexpr Real magic = S::round_magic + S::exponent_bias;  // the low bits get n plus the bias
  constexpr Real ln2 = 0.69314718055994530942;  // one step errs about as much as rounding x
  const Vector<Real> shifted = x * Real(1.44269504088896340736) + magic;
  const Vector<Real> r = x - (shifted - magic) * ln2;
  const auto power = (Vector<Real>)((Words<Real>)shifted << S::mantissa_bits);
  return x < S::exp_min ? Vector<Real>{} : polynomial<Real>(S::exp_series, r) * power;
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

// The cosine and sine of r + quadrant * pi / 2, for |r| up to pi / 4. Minimax polynomials in r^2 for
// cos(r) and sin(r) / r (Remez algorithm): their error is 5e-9, in float64 6e-18, below rounding
// errors.
template <typename Real>
VICINAL_INLINE inline void cosine_and_sine(Vector<Real> r, Words<Real> quadrant,
                                           Vector<Real>& cosine, Vector<Real>& sine) {
  using V = Vector<Real>;
  using W = Words<Real>;
  constexpr int sign = 8 * sizeof(Real) - 1;
  const V square = r * r;
  const V even = polynomial<Real>(Simd<Real>::cos_series, square);
  const V odd = polynomial<Real>(Simd<Real>::sin_series, square) * r;
  const auto swap = (quadrant & 1) != 0;
  cosine = (V)((W)(swap ? odd : even) ^ (quadrant + 1) >> 1 << sign);
  sine = (V)((W)(swap ? even : odd) ^ quadrant >> 1 << sign);
}

}  // namespace vicinal::VICINAL_ISA
