// Rotary positions, for one instruction set: see vectors.h.

namespace vicinal::VICINAL_ISA {

// Rows are rotated in one sweep: angles from coordinates, their cosines and sines, the rotation.
// Nothing but the result is written, and the backward pass needs nothing but that.
template <typename T>
class Rotator {
  using Real = typename SumType<T>::type;
  using V = Vector<Real>;

 public:
  explicit Rotator(const Rotation& rotation)
      : r_(rotation),
        vectors_((rotation.pairs + n_lanes<Real> - 1) / n_lanes<Real>),
        table_(rotation.coordinates_per_row * vectors_),
        cosines_(vectors_),
        sines_(vectors_),
        slopes_(vectors_),
        sums_(rotation.coordinates_per_row * vectors_) {
    const Real* frequencies = static_cast<const Real*>(r_.frequencies);
    for (int64_t c = 0; c < r_.coordinates_per_row; ++c) {
      Real* row = reinterpret_cast<Real*>(&table_[c * vectors_]);
      std::fill_n(&table_[c * vectors_], vectors_, V{});
      std::copy_n(frequencies + c * r_.pairs, r_.pairs, row);
    }
  }

  void forward(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      find_angles(row);
      rotate(r_.x, r_.out, row, 1);
    }
  }

  // Gradients of x, of the coordinates, and this run of rows' part of that of the frequencies.
  void backward(int64_t begin, int64_t end, int64_t item) {
    std::fill_n(sums_.get(), r_.coordinates_per_row * vectors_, V{});
    std::fill_n(slopes_.get(), vectors_, V{});
    for (int64_t row = begin; row < end; ++row) {
      find_angles(row);
      rotate(r_.grad_out, r_.grad_x, row, -1);
      find_slopes(row);
      for (int64_t c = 0; c < r_.coordinates_per_row; ++c) add_gradients(row, c);
    }
    Real* parts = static_cast<Real*>(r_.grad_frequency_parts);
    for (int64_t c = 0; c < r_.coordinates_per_row; ++c) {
      const Real* sums = reinterpret_cast<const Real*>(&sums_[c * vectors_]);
      std::copy_n(sums, r_.pairs, parts + (item * r_.coordinates_per_row + c) * r_.pairs);
    }
  }

 private:
  void find_angles(int64_t row) {
    const Real* coordinates = static_cast<const Real*>(r_.coordinates) + row * r_.coordinates_per_row;
    for (int64_t at = 0; at < vectors_; ++at) {
      V angle = coordinates[0] * table_[at];
      for (int64_t c = 1; c < r_.coordinates_per_row; ++c)
        angle += coordinates[c] * table_[c * vectors_ + at];
      cosine_and_sine<Real>(angle, cosines_[at], sines_[at]);
    }
  }

  void rotate(const Rows& from, const Rows& to, int64_t row, Real direction) {
    const int64_t width = from.width / 2;
    const Real* cosines = reinterpret_cast<const Real*>(cosines_.get());
    const Real* sines = reinterpret_cast<const Real*>(sines_.get());
    for (int64_t head = 0; head < r_.heads; ++head, cosines += width, sines += width) {
      const T* in = row_of<T>(from, row, head);
      T* __restrict out = row_of<T>(to, row, head);
      for (int64_t pair = 0; pair < width; ++pair) {
        const Real even = in[2 * pair], odd = in[2 * pair + 1], sine = direction * sines[pair];
        out[2 * pair] = T(even * cosines[pair] - odd * sine);
        out[2 * pair + 1] = T(even * sine + odd * cosines[pair]);
      }
    }
  }

  // The gradient of the row's angles: to turn further is to move at right angles to the result.
  void find_slopes(int64_t row) {
    const int64_t width = r_.out.width / 2;
    Real* slopes = reinterpret_cast<Real*>(slopes_.get());
    for (int64_t head = 0; head < r_.heads; ++head, slopes += width) {
      const T* out = row_of<T>(r_.out, row, head);
      const T* grad = row_of<T>(r_.grad_out, row, head);
      for (int64_t pair = 0; pair < width; ++pair)
        slopes[pair] = Real(grad[2 * pair + 1]) * Real(out[2 * pair]) -
                       Real(grad[2 * pair]) * Real(out[2 * pair + 1]);
    }
  }

  void add_gradients(int64_t row, int64_t c) {
    const int64_t at = row * r_.coordinates_per_row + c;
    const Real coordinate = static_cast<const Real*>(r_.coordinates)[at];
    V along{};
    for (int64_t v = 0; v < vectors_; ++v) {
      sums_[c * vectors_ + v] += coordinate * slopes_[v];
      along += table_[c * vectors_ + v] * slopes_[v];
    }
    Real sum = 0;
    for (int lane = 0; lane < n_lanes<Real>; ++lane) sum += along[lane];
    static_cast<Real*>(r_.grad_coordinates)[at] = sum;
  }

  const Rotation& r_;
  const int64_t vectors_;
  Buffer<V> table_, cosines_, sines_, slopes_, sums_;
};

template <typename T>
void rotate_rows(const Rotation& rotation, Work& work, bool forward) {
  Rotator<T> rotator(rotation);
  for (int64_t item = work.take(); item < work.items(); item = work.take()) {
    const int64_t begin = item * work.tiles_per_item;
    const int64_t end = std::min(begin + work.tiles_per_item, work.tiles);
    if (forward) rotator.forward(begin, end);
    else rotator.backward(begin, end, item);
  }
}

inline void rotate(Storage storage, const Rotation& rotation, Work& work, bool forward) {
  with_storage(storage, [&](auto type) { rotate_rows<decltype(type)>(rotation, work, forward); });
}

}  // namespace vicinal::VICINAL_ISA
