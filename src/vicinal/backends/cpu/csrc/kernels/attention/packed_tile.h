// A buffer of packed rows of a tile, for one group of heads: [slots, vectors_per_row]. Row 0 is
// padding, zero.

namespace vicinal::VICINAL_ISA {

template <typename L>
class PackedTile {
  using V = Vector<typename L::Real>;

 public:
  explicit PackedTile(int64_t width) : vectors_per_row_(L::vectors_per_row(width)) {}

  // Makes room for `n_slots` rows. Row 0 is zero, other rows are uninitialized.
  void resize(int64_t n_slots) {
    rows_.reserve(n_slots * vectors_per_row_);
    std::fill_n(rows_.get(), vectors_per_row_, V{});
  }
  void resize_zeros(int64_t n_slots) {
    rows_.reserve(n_slots * vectors_per_row_);
    std::fill_n(rows_.get(), n_slots * vectors_per_row_, V{});
  }

  PackedRows<L> rows() { return {rows_.get(), vectors_per_row_}; }
  V* row(int64_t slot) { return rows().row(slot); }

 private:
  const int64_t vectors_per_row_;
  Buffer<V> rows_;  // [slots, vectors_per_row]
};

}  // namespace vicinal::VICINAL_ISA
