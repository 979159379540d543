// The rotary encoding, forward and backward. See kernels.h for how it is included.

namespace vicinal::VICINAL_ISA {

// Each row is rotated in one pass: angles from coordinates, their cosines and sines, the rotation.
// Angles are never stored: the backward pass recomputes them, and needs only `out` besides.
// Per-row vectors of channel pairs are [n_vectors], for n_pairs pairs, zero-padded.
template <typename T>
class RotaryKernel {
  using Real = typename Accumulator<T>::type;
  using V = Vector<Real>;

 public:
  explicit RotaryKernel(const RotaryParams& params)
      : p_(params),
        n_vectors_((params.n_pairs + n_lanes<Real> - 1) / n_lanes<Real>),
        frequencies_(params.n_coordinates * n_vectors_),
        cosines_(n_vectors_),
        sines_(n_vectors_),
        grad_angles_(n_vectors_),
        grad_frequencies_(params.n_coordinates * n_vectors_) {
    const Real* frequencies = static_cast<const Real*>(p_.frequencies);
    for (int64_t c = 0; c < p_.n_coordinates; ++c) {
      Real* row = reinterpret_cast<Real*>(&frequencies_[c * n_vectors_]);
      std::fill_n(&frequencies_[c * n_vectors_], n_vectors_, V{});
      std::copy_n(frequencies + c * p_.n_pairs, p_.n_pairs, row);
    }
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
    Real* parts = static_cast<Real*>(p_.grad_frequency_parts);
    for (int64_t c = 0; c < p_.n_coordinates; ++c) {
      const Real* sums = reinterpret_cast<const Real*>(&grad_frequencies_[c * n_vectors_]);
      std::copy_n(sums, p_.n_pairs, parts + (chunk * p_.n_coordinates + c) * p_.n_pairs);
    }
  }

 private:
  // Computes cosines_ and sines_ of coordinates[row] @ frequencies.
  void compute_angles(int64_t row) {
    const Real* coordinates = static_cast<const Real*>(p_.coordinates) + row * p_.n_coordinates;
    for (int64_t i = 0; i < n_vectors_; ++i) {
      V angle = coordinates[0] * frequencies_[i];
      for (int64_t c = 1; c < p_.n_coordinates; ++c)
        angle += coordinates[c] * frequencies_[c * n_vectors_ + i];
      cosine_and_sine<Real>(angle, cosines_[i], sines_[i]);
    }
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

  // The gradients by coordinate c of a row, and by its frequencies.
  void accumulate_gradients(int64_t row, int64_t c) {
    const int64_t index = row * p_.n_coordinates + c;
    const Real coordinate = static_cast<const Real*>(p_.coordinates)[index];
    V products{};
    for (int64_t i = 0; i < n_vectors_; ++i) {
      grad_frequencies_[c * n_vectors_ + i] += coordinate * grad_angles_[i];
      products += frequencies_[c * n_vectors_ + i] * grad_angles_[i];
    }
    Real sum = 0;
    for (int lane = 0; lane < n_lanes<Real>; ++lane) sum += products[lane];
    static_cast<Real*>(p_.grad_coordinates)[index] = sum;
  }

  const RotaryParams& p_;
  const int64_t n_vectors_;
  Buffer<V> frequencies_;       // [C, n_vectors]
  Buffer<V> cosines_, sines_;   // [n_vectors], of the current row
  Buffer<V> grad_angles_;       // [n_vectors], of the current row
  Buffer<V> grad_frequencies_;  // [C, n_vectors], sums over rows
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
