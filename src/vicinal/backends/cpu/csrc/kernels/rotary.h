// The rotary encoding, forward and backward. See kernels.h for how it is included.

namespace vicinal::VICINAL_ISA {

// Angles are sums in float64, and so exact at coordinates where float32 would lose whole turns.
// They are reduced to a quadrant before they are rounded to float32.
typedef Vector<double> Angles;

// As many numbers as Angles has lanes, at any address of an array of them.
template <typename Number>
struct AnglesAs {
  typedef Number Vector __attribute__((vector_size(n_lanes<double> * sizeof(Number)),
                                       aligned(sizeof(Number)), may_alias));
};

// The largest angle that reduce_to_quadrant takes, 2^34.
constexpr double kMaxAngle = 17179869184.0;

// Returns angle - n * pi / 2, at most pi / 4 in magnitude. The low bits of `quadrant` are those of n.
// Cody-Waite reduction: the first two parts of pi / 2 have 19 bits, so their products with n, of up to
// 34 bits, are exact even where products are rounded before they are subtracted.
VICINAL_INLINE inline Angles reduce_to_quadrant(Angles angle, Words<double>& quadrant) {
  constexpr double kHalfPi[] = {1.5707931518554688, 3.1749368645250797e-06, 2.563344151594519e-12};
  constexpr double kRound = Simd<double>::round_magic;
  const Angles shifted = angle * 0.63661977236758134308 + kRound;
  for (double part : kHalfPi) angle -= (shifted - kRound) * part;
  quadrant = (Words<double>)shifted;
  return angle;
}

// Each row is rotated in one pass: angles from coordinates, their cosines and sines, the rotation.
// Angles of all rows are never stored: the backward pass recomputes them, and needs only `out`
// besides. Per-row vectors of channel pairs are [n_vectors], for n_pairs pairs, zero-padded.
template <typename T>
class RotaryKernel {
  using Real = typename Accumulator<T>::type;
  using V = Vector<Real>;
  using Word = typename Simd<Real>::Word;

 public:
  explicit RotaryKernel(const RotaryParams& params)
      : p_(params),
        n_vectors_((params.n_pairs + n_lanes<Real> - 1) / n_lanes<Real>),
        n_lanes_(n_vectors_ * n_lanes<Real>),
        frequencies_(params.n_coordinates * n_lanes_),
        rounded_frequencies_(params.n_coordinates * n_vectors_),
        largest_frequencies_(params.n_coordinates),
        angles_(n_vectors_),
        quadrants_(n_vectors_),
        cosines_(n_vectors_),
        sines_(n_vectors_),
        grad_angles_(n_vectors_),
        grad_frequencies_(params.n_coordinates * n_vectors_) {
    std::fill_n(frequencies_.get(), p_.n_coordinates * n_lanes_, 0);
    for (int64_t c = 0; c < p_.n_coordinates; ++c) {
      const double* frequencies = p_.frequencies + c * p_.n_pairs;
      std::copy_n(frequencies, p_.n_pairs, &frequencies_[c * n_lanes_]);
      largest_frequencies_[c] = 0;
      for (int64_t pair = 0; pair < p_.n_pairs; ++pair)
        largest_frequencies_[c] = std::fmax(largest_frequencies_[c], std::abs(frequencies[pair]));
    }
    std::copy_n(frequencies_.get(), p_.n_coordinates * n_lanes_,
                reinterpret_cast<Real*>(rounded_frequencies_.get()));
  }

  void forward(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      compute_angles(row);
      rotate(p_.x, p_.out, row, 1);
    }
  }

  // Computes grad_x and grad_coordinates of the rows [begin, end), and their partial sum of
  // grad_frequencies, which is that of `chunk`.
  void backward(int64_t begin, int64_t end, int64_t chunk) {
    std::fill_n(grad_frequencies_.get(), p_.n_coordinates * n_vectors_, V{});
    std::fill_n(grad_angles_.get(), n_vectors_, V{});
    for (int64_t row = begin; row < end; ++row) {
      compute_angles(row);
      rotate(p_.grad_out, p_.grad_x, row, -1);
      compute_grad_angles(row);
      for (int64_t c = 0; c < p_.n_coordinates; ++c) accumulate_gradients(row, c);
    }
    for (int64_t c = 0; c < p_.n_coordinates; ++c) {
      const Real* sums = reinterpret_cast<const Real*>(&grad_frequencies_[c * n_vectors_]);
      std::copy_n(sums, p_.n_pairs,
                  p_.grad_frequency_parts + (chunk * p_.n_coordinates + c) * p_.n_pairs);
    }
  }

 private:
  // Computes cosines_ and sines_ of coordinates[row] @ frequencies. The C library does where angles
  // may be too large for the reduction, or a coordinate is NaN.
  void compute_angles(int64_t row) {
    const double* coordinates = p_.coordinates + row * p_.n_coordinates;
    double bound = 0;
    for (int64_t c = 0; c < p_.n_coordinates; ++c)
      bound += std::abs(coordinates[c]) * largest_frequencies_[c];
    if (!(bound < kMaxAngle)) return compute_large_angles(coordinates);
    Real* const angles = reinterpret_cast<Real*>(angles_.get());
    Word* const quadrants = reinterpret_cast<Word*>(quadrants_.get());
    for (int64_t i = 0; i < n_lanes_; i += n_lanes<double>) {
      Words<double> quadrant;
      const Angles angle = reduce_to_quadrant(angles_at(coordinates, i), quadrant);
      store_as(angles + i, angle);
      store_as(quadrants + i, quadrant);
    }
    for (int64_t i = 0; i < n_vectors_; ++i)
      cosine_and_sine<Real>(angles_[i], quadrants_[i], cosines_[i], sines_[i]);
  }

  void compute_large_angles(const double* coordinates) {
    Real* const cosines = reinterpret_cast<Real*>(cosines_.get());
    Real* const sines = reinterpret_cast<Real*>(sines_.get());
    for (int64_t i = 0; i < n_lanes_; i += n_lanes<double>) {
      const Angles angle = angles_at(coordinates, i);
      for (int lane = 0; lane < n_lanes<double>; ++lane) {
        cosines[i + lane] = std::cos(angle[lane]);
        sines[i + lane] = std::sin(angle[lane]);
      }
    }
  }

  // The angles from pair i on.
  VICINAL_INLINE Angles angles_at(const double* coordinates, int64_t i) const {
    Angles angle = coordinates[0] * frequencies_at(0, i);
    for (int64_t c = 1; c < p_.n_coordinates; ++c) angle += coordinates[c] * frequencies_at(c, i);
    return angle;
  }

  template <typename Number, typename From>
  static VICINAL_INLINE void store_as(Number* to, From from) {
    using To = typename AnglesAs<Number>::Vector;
    *reinterpret_cast<To*>(to) = __builtin_convertvector(from, To);
  }

  // The frequencies of coordinate c from pair i on.
  VICINAL_INLINE const Angles& frequencies_at(int64_t c, int64_t i) const {
    return *reinterpret_cast<const Angles*>(&frequencies_[c * n_lanes_ + i]);
  }

  // Rotates one row; a direction of -1 is the inverse rotation.
  void rotate(const Rows& from, const Rows& to, int64_t row, Real direction) {
    const int64_t pairs_per_head = from.width / 2;
    const Real* cosines = reinterpret_cast<const Real*>(cosines_.get());
    const Real* sines = reinterpret_cast<const Real*>(sines_.get());
    for (int64_t head = 0; head < p_.n_heads; ++head) {
      const T* in = row_ptr<T>(from, row, head);
      T* __restrict out = row_ptr<T>(to, row, head);
      for (int64_t pair = 0; pair < pairs_per_head; ++pair) {
        const Real even = in[2 * pair], odd = in[2 * pair + 1], sine = direction * sines[pair];
        out[2 * pair] = T(even * cosines[pair] - odd * sine);
        out[2 * pair + 1] = T(even * sine + odd * cosines[pair]);
      }
      cosines += pairs_per_head, sines += pairs_per_head;
    }
  }

  // The derivative of a rotated pair with respect to its angle is the pair rotated by 90 degrees.
  void compute_grad_angles(int64_t row) {
    const int64_t pairs_per_head = p_.out.width / 2;
    Real* grad_angles = reinterpret_cast<Real*>(grad_angles_.get());
    for (int64_t head = 0; head < p_.n_heads; ++head, grad_angles += pairs_per_head) {
      const T* out = row_ptr<T>(p_.out, row, head);
      const T* grad = row_ptr<T>(p_.grad_out, row, head);
      for (int64_t pair = 0; pair < pairs_per_head; ++pair)
        grad_angles[pair] = Real(grad[2 * pair + 1]) * Real(out[2 * pair]) -
                            Real(grad[2 * pair]) * Real(out[2 * pair + 1]);
    }
  }

  // The gradients by the frequencies of coordinate c, and by that coordinate of a row if needed.
  void accumulate_gradients(int64_t row, int64_t c) {
    const int64_t index = row * p_.n_coordinates + c;
    const Real coordinate = p_.coordinates[index];
    for (int64_t i = 0; i < n_vectors_; ++i)
      grad_frequencies_[c * n_vectors_ + i] += coordinate * grad_angles_[i];
    if (p_.grad_coordinates == nullptr) return;
    V products{};
    for (int64_t i = 0; i < n_vectors_; ++i)
      products += rounded_frequencies_[c * n_vectors_ + i] * grad_angles_[i];
    Real sum = 0;
    for (int lane = 0; lane < n_lanes<Real>; ++lane) sum += products[lane];
    p_.grad_coordinates[index] = sum;
  }

  const RotaryParams& p_;
  const int64_t n_vectors_, n_lanes_;   // n_lanes: of n_vectors vectors, n_pairs or more
  Buffer<double> frequencies_;          // [C, n_lanes]
  Buffer<V> rounded_frequencies_;       // [C, n_vectors]
  Buffer<double> largest_frequencies_;  // [C], absolute
  Buffer<V> angles_;                    // [n_vectors], of the current row, reduced to a quadrant
  Buffer<Words<Real>> quadrants_;       // [n_vectors], of the current row
  Buffer<V> cosines_, sines_;           // [n_vectors], of the current row
  Buffer<V> grad_angles_;               // [n_vectors], of the current row
  Buffer<V> grad_frequencies_;          // [C, n_vectors], sums over rows
};

template <typename T>
void rotary_with(const RotaryParams& params, WorkQueue& queue, bool forward) {
  RotaryKernel<T> kernel(params);
  for (int64_t chunk = queue.take(); chunk < queue.n_chunks; chunk = queue.take()) {
    if (forward) kernel.forward(queue.begin(chunk), queue.end(chunk));
    else kernel.backward(queue.begin(chunk), queue.end(chunk), chunk);
  }
}

// Entry point. Every thread calls it with the same queue of rows.
inline void rotary(Dtype dtype, const RotaryParams& params, WorkQueue& queue, bool forward) {
  dispatch_dtype(dtype, [&](auto type) { rotary_with<decltype(type)>(params, queue, forward); });
}

}  // namespace vicinal::VICINAL_ISA
