// Vectors and their functions, for one instruction set. ops.cpp includes this file, and the kernels
// that build on it, once for each set, with VICINAL_ISA naming the namespace and VICINAL_BYTES the
// width of a vector register; hence no guards.

namespace vicinal::VICINAL_ISA {

template <typename Real>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vector __attribute__((vector_size(VICINAL_BYTES)));
  typedef uint32_t Bit;
  typedef Bit Bits __attribute__((vector_size(VICINAL_BYTES)));
  static constexpr int mantissa = 23, exp_terms = 7, log_terms = 4, sincos_terms = 5;
  static constexpr float round_magic = 12582912.0f, exp_lowest = -87.0f, exponent_of_one = 127;
  static constexpr float half_pi[] = {1.5703125f, 4.837512969970703e-4f, 7.549790126404332e-8f};
  static constexpr float largest_angle = 8192;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Lanes<double> {
  typedef double Vector __attribute__((vector_size(VICINAL_BYTES)));
  typedef uint64_t Bit;
  typedef Bit Bits __attribute__((vector_size(VICINAL_BYTES)));
  static constexpr int mantissa = 52, exp_terms = 13, log_terms = 10, sincos_terms = 8;
  static constexpr double round_magic = 6755399441055744.0, exp_lowest = -708.0,
                          exponent_of_one = 1023;
  static constexpr double half_pi[] = {1.570796325802803, 9.920935774287987e-10,
                                       2.2517417741562176e-18};
  static constexpr double largest_angle = 8388608;
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
};
template <typename Real>
using Vector = typename Lanes<Real>::Vector;
template <typename Real>
using Bits = typename Lanes<Real>::Bits;
template <typename Real>
constexpr int n_lanes = VICINAL_BYTES / sizeof(Real);

template <typename T>
struct SumType {
  typedef float type;
};
template <>
struct SumType<double> {
  typedef double type;
};

template <typename T>
inline T* row_of(const Rows& rows, int64_t id, int64_t head) {
  return static_cast<T*>(rows.data) + id * rows.row_stride + head * rows.head_stride;
}

// The lanes of a and b, side by side, that `source` names for each lane of the result.
template <typename Real, auto source, size_t... lane>
inline Vector<Real> shuffled(Vector<Real> a, Vector<Real> b, std::index_sequence<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, source(int(lane))...);
#else
  return __builtin_shuffle(a, b, Bits<Real>{typename Lanes<Real>::Bit(source(int(lane)))...});
#endif
}
template <typename Real, auto source>
inline Vector<Real> shuffle(Vector<Real> a, Vector<Real> b) {
  return shuffled<Real, source>(a, b, std::make_index_sequence<n_lanes<Real>>());
}

// Calls body with a value of the type in which rows are stored.
template <typename Body>
inline void with_storage(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::float32: return body(float());
    case Storage::float64: return body(double());
    case Storage::float16: return body(torch::headeronly::Half());
    case Storage::bfloat16: return body(torch::headeronly::BFloat16());
  }
}

template <typename Real>
constexpr Real inverse_factorial(int n) {
  double product = 1;
  for (int factor = 2; factor <= n; ++factor) product *= factor;
  return Real(1 / product);
}

// exp(x) for x of at most about 80: a power of two times the Taylor series of what remains, whose
// next term is less than a rounding error. Zero where the result would be denormal; NaN stays NaN.
template <typename Real>
VICINAL_INLINE inline Vector<Real> exponential(Vector<Real> x) {
  using L = Lanes<Real>;
  const Vector<Real> shifted = x * Real(1.44269504088896340736) + L::round_magic;
  const Vector<Real> power = shifted - L::round_magic;
  const Vector<Real> rest = (x - power * L::ln2_high) - power * L::ln2_low;
  Vector<Real> sum = Vector<Real>{} + inverse_factorial<Real>(L::exp_terms);
#pragma GCC unroll 13
  for (int term = L::exp_terms - 1; term >= 0; --term)
    sum = sum * rest + inverse_factorial<Real>(term);
  const auto scaled = (Vector<Real>)((Bits<Real>)sum + ((Bits<Real>)shifted << L::mantissa));
  return x >= L::exp_lowest ? scaled : x < L::exp_lowest ? Vector<Real>{} : x;
}

// log(x) for x of at least 1, finite: that of the power of two in x, and with s = (m - 1) / (m + 1)
// twice the series s + s^3 / 3 + s^5 / 5 + ... for what remains, m from 1 / sqrt(2) to sqrt(2), to
// where the next term is less than a rounding error. NaN stays NaN.
template <typename Real>
inline Vector<Real> logarithm(Vector<Real> x) {
  using L = Lanes<Real>;
  using B = Bits<Real>;
  const B one = (B)(Vector<Real>{} + Real(1));
  const B root = (B)(Vector<Real>{} + Real(0.70710678118654752440));
  // Adding the difference carries into the exponent where the mantissa is above that of sqrt(2).
  const B shifted = (B)x + (one - root);
  const B mantissa = shifted & ((typename L::Bit(1) << L::mantissa) - 1);
  const Vector<Real> m = (Vector<Real>)(mantissa + root);
  const Vector<Real> power =
      (Vector<Real>)((shifted >> L::mantissa) + (B)(Vector<Real>{} + L::round_magic)) -
      (L::round_magic + L::exponent_of_one);
  const Vector<Real> s = (m - 1) / (m + 1), square = s * s;
  Vector<Real> sum{};
#pragma GCC unroll 13
  for (int term = L::log_terms; term >= 0; --term) sum = sum * square + Real(2) / (2 * term + 1);
  const Vector<Real> log = power * L::ln2_high + (power * L::ln2_low + s * sum);
  return x == x ? log : x;
}

// The finaliser of A. Appleby's MurmurHash3 on 32 bits, whatever the width of the lanes.
template <typename Unsigned>
inline Unsigned mix(Unsigned x) {
  x = ((x ^ (x >> 16)) * 0x85EBCA6Bu) & 0xFFFFFFFFu;
  x = ((x ^ (x >> 13)) * 0xC2B2AE35u) & 0xFFFFFFFFu;
  return x ^ (x >> 16);
}

// Cosine and sine of x: reduced to a quarter turn in three steps, each exact, then Taylor series.
// Angles too large for that go to the C library, one by one.
template <typename Real>
inline void cosine_and_sine(Vector<Real> x, Vector<Real>& cosine, Vector<Real>& sine) {
  using L = Lanes<Real>;
  using V = Vector<Real>;
  using B = Bits<Real>;
  bool reducible = true;
  for (int lane = 0; lane < n_lanes<Real>; ++lane)
    reducible &= x[lane] < L::largest_angle && x[lane] > -L::largest_angle;
  if (!reducible) {
    for (int lane = 0; lane < n_lanes<Real>; ++lane) {
      cosine[lane] = std::cos(x[lane]);
      sine[lane] = std::sin(x[lane]);
    }
    return;
  }
  const V shifted = x * Real(0.63661977236758134308) + L::round_magic;
  const V turns = shifted - L::round_magic;
  V rest = x;
  for (Real part : L::half_pi) rest -= turns * part;
  const V square = rest * rest;
  V even = V{} + Real(1), odd = V{} + Real(1);
#pragma GCC unroll 8
  for (int term = L::sincos_terms; term > 0; --term) {
    even = Real(1) - even * square * (Real(1) / ((2 * term - 1) * (2 * term)));
    odd = Real(1) - odd * square * (Real(1) / ((2 * term) * (2 * term + 1)));
  }
  odd *= rest;
  const B quarter = (B)shifted;
  const auto swapped = (quarter & 1) != 0;
  const V c = swapped ? odd : even, s = swapped ? even : odd;
  cosine = ((quarter + 1) & 2) != 0 ? -c : c;
  sine = (quarter & 2) != 0 ? -s : s;
}

}  // namespace vicinal::VICINAL_ISA
