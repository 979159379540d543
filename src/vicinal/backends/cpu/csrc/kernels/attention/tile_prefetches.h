// The prefetches of the attention kernels, for one tile at a time.

namespace vicinal::VICINAL_ISA {

// The heads from `head` on of the points in slots [first, stop).
struct SlotRange {
  int64_t head, first, stop;
};

// The prefetches that belong to a query block, for the block after it. They are made a few rows at a
// time, between the loops over keys: processors wait with, or drop, those beyond the number of cache
// misses that they can have at once.
template <typename L>
class TilePrefetches {
 public:
  // `queries` are the tensors of queries that the pass reads or writes.
  TilePrefetches(const AttentionParams& params, const TileNeighbors& neighbors,
                 std::array<const Rows*, 4> queries)
      : p_(params), neighbors_(neighbors), queries_(queries) {}

  // Divides the tile's slots evenly among its query blocks, also for packing: the range of the block
  // of queries from `first` on. Empty past the last head.
  SlotRange slot_range(int first, int64_t head) const {
    const int64_t n_blocks = (p_.tile_queries + kQueryBlock - 1) / kQueryBlock;
    const int64_t block = first / kQueryBlock;
    const int64_t points = head < p_.n_heads ? neighbors_.n_slots - 1 : 0;
    return {head, 1 + block * points / n_blocks, 1 + (block + 1) * points / n_blocks};
  }

  // Prefetches the keys and values of a range now, not in steps.
  VICINAL_INLINE void prefetch_points(const SlotRange& range) {
    for (int64_t slot = range.first; slot < range.stop; ++slot)
      prefetch_point(slot, range.head, p_.k, p_.v);
  }

  // Begins with those for the query block after that from `first` on, which may be the first of the
  // next heads, and for the gradients of points in this block. They are made in n_steps steps.
  void begin(int first, int64_t head, const SlotRange& grads, int64_t n_steps) {
    first += kQueryBlock;
    if (first >= p_.tile_queries) first = 0, head += L::kHeads;
    query_ = first;
    stop_ = head < p_.n_heads ? std::min<int64_t>(first + kQueryBlock, p_.tile_queries) : first;
    head_ = head;
    points_ = slot_range(first, head + L::kHeads);
    grads_ = grads;
    const int64_t n_rows =
        points_.stop - points_.first + grads_.stop - grads_.first + stop_ - query_;
    rows_per_step_ = (n_rows + n_steps - 1) / n_steps;
  }
  void step() {
    for (int64_t i = 0; i < rows_per_step_; ++i) prefetch_row();
  }
  void finish() {
    while (prefetch_row()) {}
  }

 private:
  // Makes the prefetches for one point or query. Returns false if none is left.
  bool prefetch_row() {
    if (points_.first < points_.stop) {
      prefetch_point(points_.first++, points_.head, p_.k, p_.v);
    } else if (grads_.first < grads_.stop) {
      prefetch_point(grads_.first++, grads_.head, p_.grad_k, p_.grad_v);
    } else if (query_ < stop_) {
      const int64_t id = neighbors_.query_ids[query_++];
      for (const Rows* rows : queries_)
        if (rows && id >= 0) prefetch<L>(*rows, id, head_);
    } else {
      return false;
    }
    return true;
  }
  VICINAL_INLINE void prefetch_point(int64_t slot, int64_t head, const Rows& keys,
                                     const Rows& values) {
    prefetch<L>(keys, neighbors_.point_ids[slot], head);
    prefetch<L>(values, neighbors_.point_ids[slot], head);
  }

  const AttentionParams& p_;
  const TileNeighbors& neighbors_;
  const std::array<const Rows*, 4> queries_;  // null past the last
  int64_t query_ = 0, stop_ = 0;              // indices of queries
  int64_t head_ = 0;                          // of the queries
  SlotRange points_{}, grads_{};              // of k and v; of their gradients, in this block
  int64_t rows_per_step_ = 0;
};

}  // namespace vicinal::VICINAL_ISA
