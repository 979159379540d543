// The rotary encoding, forward and backward. See kernels.h for how it is included.

namespace vicinal::VICINAL_ISA {

// Angles are sums in float64, and so exact at coordinates where float32 would lose whole turns.
// Float32 takes them modulo a turn of 2 pi.
typedef Vector<double> Angles;

// As many numbers of type Real as Angles has lanes, at any address of an array of them.
template <typename Real>
struct AnglesAs {
  typedef Real Vector
      __attribute__((vector_size(n_lanes<double> * sizeof(Real)), aligned(sizeof(Real)), may_alias));
};

// The first part of a turn has 22 bits, so its product with up to 2^31 turns is exact.
constexpr double kTurnHigh = 6.283184051513672, kTurnLow = 1.2556659146019252e-06;

VICINAL_INLINE inline Angles reduce_to_one_turn(Angles angle) {
  constexpr double kTurnsPerRadian = 0.15915494309189533577, kRound = Simd<double>::round_magic;
  const Angles turns = (angle * kTurnsPerRadian + kRound) - kRound;
  return (angle - turns * kTurnHigh) - turns * kTurnLow;
}

// Each row is rotated in one pass: angles from coordinates, their cosines and sines, the rotation.
// Angles of all rows are never stored: the backward pass recomputes them, and needs only `out`
// besides. Per-row vectors of channel pairs are [n_vectors], for n_pairs pairs, zero-padded.
template <typename T>
class RotaryKernel {
  using Real = typename Accumulator<T>::type;
  using V = Vector<Real>;

 public:
  explicit RotaryKernel(const RotaryParams& params)
      : p_(params),
        n_vectors_((params.n_pairs + n_lanes<Real> - 1) / n_lanes<Real>),
        n_lanes_(n_vectors_ * n_lanes<Real>),
        frequencies_(params.n_coordinates * n_lanes_),
        rounded_frequencies_(params.n_coordinates * n_vectors_),
        angles_(n_vectors_),
        cosines_(n_vectors_),
        sines_(n_vectors_),
        grad_angles_(n_vectors_),
        grad_frequencies_(params.n_coordinates * n_vectors_) {
    std::fill_n(frequencies_.get(), p_.n_coordinates * n_lanes_, 0);
    for (int64_t c = 0; c < p_.n_coordinates; ++c)
      std::copy_n(p_.frequencies + c * p_.n_pairs, p_.n_pairs, &frequencies_[c * n_lanes_]);
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
  // Computes cosines_ and sines_ of coordinates[row] @ frequencies.
  void compute_angles(int64_t row) {
    const double* coordinates = p_.coordinates + row * p_.n_coordinates;
    Real* const angles = reinterpret_cast<Real*>(angles_.get());
    for (int64_t i = 0; i < n_lanes_; i += n_lanes<double>) {
      Angles angle = coordinates[0] * frequencies_at(0, i);
      for (int64_t c = 1; c < p_.n_coordinates; ++c) angle += coordinates[c] * frequencies_at(c, i);
      if constexpr (!std::is_same_v<Real, double>) angle = reduce_to_one_turn(angle);
      using Converted = typename AnglesAs<Real>::Vector;
      *reinterpret_cast<Converted*>(angles + i) = __builtin_convertvector(angle, Converted);
    }
    for (int64_t i = 0; i < n_vectors_; ++i)
      cosine_and_sine<Real>(angles_[i], cosines_[i], sines_[i]);
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
  const int64_t n_vectors_, n_lanes_;  // n_lanes: of n_vectors vectors, n_pairs or more
  Buffer<double> frequencies_;         // [C, n_lanes]
  Buffer<V> rounded_frequencies_;      // [C, n_vectors]
  Buffer<V> angles_;                   // [n_vectors], of the current row
  Buffer<V> cosines_, sines_;          // [n_vectors], of the current row
  Buffer<V> grad_angles_;              // [n_vectors], of the current row
  Buffer<V> grad_frequencies_;         // [C, n_vectors], sums over rows
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
