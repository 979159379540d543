// The neighbors of a tile of queries: the union of their points, and per query a list of indices
// into it. See kernels.h for how it is included.

namespace vicinal::VICINAL_ISA {

// A SIMD vector of indices, at any address.
typedef int32_t IndexVector __attribute__((vector_size(VICINAL_BYTES), aligned(4), may_alias));
constexpr int kIndexLanes = VICINAL_BYTES / sizeof(int32_t);
constexpr int kListPadding = 16;  // zeros after a slot list, for loops that read past its end

// The keys of one query, as rows of a packed tile buffer; padded with slot 0.
struct SlotList {
  const int32_t* slots;  // [count], and padding
  int64_t count;         // without padding
};

// The union of the points of a tile's queries, numbered by slots 1, 2, ..., and for each query the
// slots of its own points. Slot 0 is padding. The plan's tensors are not trusted: invalid queries
// and points are dropped.
//
// Positions of `order` that belong to the union are set in a bitmap. Slots are consecutive within a
// 64-bit word, so a slice needs one lookup per word, and the popcount below its first bit:
//
//     order position   0 1 2 3 4 5 6 7
//     query 0          [---)     [---)     slices [0, 2) and [5, 7)
//     query 1            [---)             slice [1, 3)
//     bitmap           1 1 1 0 0 1 1 0
//     slot             1 2 3     4 5       query 0: 1 2 4 5; query 1: 2 3
//
// On coarse levels, consecutive queries mostly have the same slices. A query's trailing slices that
// equal those of the previous query are not expanded again: the end of the previous list is copied.
class TileNeighbors {
 public:
  TileNeighbors(const NeighborSlices& slices, int64_t tile_queries)
      : slices_(slices),
        tile_queries_(tile_queries),
        bitmap_(slices.n_points / 64 + 1),
        suffix_lengths_(slices.n_slices) {}

  // Loads the queries of a tile and finds their points. query_mask: [N] or null, true: masked.
  void load_points(int64_t tile, const bool* query_mask) {
    load_queries(tile, query_mask);
    slots_.reserve(mark_positions() + tile_queries_ * kListPadding + kIndexLanes);
    assign_slots();
  }

  // Writes the slot lists of the tile.
  void write_lists() {
    int64_t end = 0;
    for (int i = 0; i < tile_queries_; ++i) {
      list_begins_[i] = end;
      int32_t* list = &slots_[end];
      shared_counts_[i] = 0;
      list_counts_[i] = query_valid[i] ? write_list(i, list) : 0;
      std::fill_n(list + list_counts_[i], kListPadding, 0);
      end += list_counts_[i] + kListPadding;
    }
    for (int64_t index : nonzero_words_) bitmap_[index].bits = 0;
    nonzero_words_.clear();
  }

  SlotList list(int i) const { return {slots_.get() + list_begins_[i], list_counts_[i]}; }
  // The number of slots at the end of list i that are also at the end of list i - 1.
  int64_t shared_count(int i) const { return shared_counts_[i]; }

  int64_t query_ids[kMaxTile];  // [tile_queries], -1 past the last query
  bool query_valid[kMaxTile];   // [tile_queries], false for masked queries and for query id -1
  Buffer<int32_t> point_ids;    // [n_slots], -1 for slot 0
  int64_t n_slots = 1;

 private:
  struct BitmapWord {
    uint64_t bits = 0;
    int32_t first_slot = 0;
  };

  void load_queries(int64_t tile, const bool* query_mask) {
    for (int i = 0; i < tile_queries_; ++i) {
      const int64_t index = tile * tile_queries_ + i;
      const int64_t query = index < slices_.n_queries ? slices_.traversal[index] : -1;
      query_ids[i] = query >= 0 && query < slices_.n_queries ? query : -1;
      query_valid[i] = query_ids[i] >= 0 && !(query_mask && query_mask[query]);
      for (int64_t slice = 0; query_valid[i] && slice < slices_.n_slices; slice += 16) {
        __builtin_prefetch(slices_.starts + query * slices_.n_slices + slice);
        __builtin_prefetch(slices_.stops + query * slices_.n_slices + slice);
      }
    }
  }

  // Calls body(word index, bits of that word) for the positions of a slice; `slice` is a flat index
  // into [N, S].
  template <typename Body>
  void for_words(int64_t slice, const Body& body) {
    const int64_t start = slices_.start(slice), stop = std::max(slices_.stop(slice), start);
    uint64_t bits = ~uint64_t(0) << start % 64;
    int64_t word = start / 64;
    for (; stop - word * 64 > 64; ++word, bits = ~uint64_t(0)) body(word, bits);
    body(word, bits & low_bits(stop - word * 64));
  }
  // The lowest `count` bits, for count up to 64. A single shift by 64 would be undefined.
  static uint64_t low_bits(uint64_t count) {
    return (uint64_t(1) << count / 2 << (count - count / 2)) - 1;
  }

  // Sets the bitmap to the union of all slices. Returns an upper bound of the total list length.
  int64_t mark_positions() {
    int64_t max_length = 0;
    for (int i = 0; i < tile_queries_; ++i) {
      if (!query_valid[i]) continue;
      const int64_t first = query_ids[i] * slices_.n_slices;
      n_expanded_[i] = slices_.n_slices - count_shared_slices(i);
      for (int64_t slice = first; slice < first + n_expanded_[i]; ++slice) mark_slice(slice);
      for (int64_t slice = first; slice < first + slices_.n_slices; ++slice)
        max_length += std::max<int64_t>(slices_.stop(slice) - slices_.start(slice), 0);
    }
    return max_length;
  }

  VICINAL_INLINE void mark_slice(int64_t slice) {
    for_words(slice, [&](int64_t index, uint64_t bits) {
      if (!bitmap_[index].bits && bits) nonzero_words_.push_back(index);
      bitmap_[index].bits |= bits;
    });
  }

  // The number of trailing slices that query i shares with the previous query of the tile.
  int64_t count_shared_slices(int i) const {
    if (i == 0 || !query_valid[i - 1]) return 0;
    const int64_t end = (query_ids[i] + 1) * slices_.n_slices;
    const int64_t previous_end = (query_ids[i - 1] + 1) * slices_.n_slices;
    int64_t shared = 0;
    while (shared < slices_.n_slices &&
           slices_.starts[end - 1 - shared] == slices_.starts[previous_end - 1 - shared] &&
           slices_.stops[end - 1 - shared] == slices_.stops[previous_end - 1 - shared])
      ++shared;
    return shared;
  }

  // Numbers the positions in the bitmap, and clears those without a valid point.
  void assign_slots() {
    int64_t max_slots = 1;
    for (int64_t index : nonzero_words_) max_slots += __builtin_popcountll(bitmap_[index].bits);
    point_ids.reserve(max_slots);
    point_ids[0] = -1;
    n_slots = 1;
    for (int64_t index : nonzero_words_) {
      BitmapWord& word = bitmap_[index];
      word.first_slot = n_slots;
      for (uint64_t remaining = word.bits; remaining; remaining &= remaining - 1) {
        const int bit = __builtin_ctzll(remaining);
        const int32_t point = slices_.order[index * 64 + bit];
        if (point < 0 || point >= slices_.n_points) word.bits &= ~(uint64_t(1) << bit);
        else point_ids[n_slots++] = point;
      }
    }
  }

  // Writes the slots of query i to `list`. Returns their number.
  int64_t write_list(int i, int32_t* const list) {
    const int64_t first = query_ids[i] * slices_.n_slices, n_expanded = n_expanded_[i];
    int32_t* end = list;
    for (int64_t slice = 0; slice < n_expanded; ++slice) {
      suffix_lengths_[slice] = list - end;
      for_words(first + slice, [&](int64_t index, uint64_t bits) {
        const BitmapWord& word = bitmap_[index];
        const int32_t slot =
            word.first_slot + __builtin_popcountll(word.bits & ((bits & -bits) - 1));
        end = write_vectors(end, __builtin_popcountll(word.bits & bits),
                            [&](int64_t offset) { return iota() + (slot + int32_t(offset)); });
      });
    }
    if (n_expanded < slices_.n_slices) {
      const int64_t length = shared_counts_[i] = suffix_lengths_[n_expanded];
      const int32_t* suffix = slots_.get() + list_begins_[i - 1] + list_counts_[i - 1] - length;
      end = write_vectors(end, length, [&](int64_t offset) {
        return *reinterpret_cast<const IndexVector*>(suffix + offset);
      });
    }
    for (int64_t slice = 0; slice < n_expanded; ++slice) suffix_lengths_[slice] += end - list;
    return end - list;
  }

  // Writes whole vectors, and so past `count`: this avoids an unpredictable branch per element.
  // Returns the end of the `count` slots.
  template <typename Source>
  static int32_t* write_vectors(int32_t* to, int64_t count, const Source& source) {
    int64_t offset = 0;
    do *reinterpret_cast<IndexVector*>(to + offset) = source(offset);
    while ((offset += kIndexLanes) < count);
    return to + count;
  }
  static IndexVector iota() {
    IndexVector indices;
#pragma GCC unroll 16
    for (int i = 0; i < kIndexLanes; ++i) indices[i] = i;
    return indices;
  }

  const NeighborSlices& slices_;
  const int64_t tile_queries_;
  int64_t list_begins_[kMaxTile], list_counts_[kMaxTile];  // [tile_queries], of each list in slots_
  int64_t shared_counts_[kMaxTile];      // [tile_queries], see shared_count
  int64_t n_expanded_[kMaxTile];         // [tile_queries], leading slices not shared with i - 1
  Buffer<int32_t> slots_;                // all slot lists, one after the other
  std::vector<BitmapWord> bitmap_;       // [nnz / 64 + 1], over positions of `order`
  std::vector<int64_t> nonzero_words_;   // indices into bitmap_
  std::vector<int64_t> suffix_lengths_;  // [S], slots of the last list from each slice to its end
};

}  // namespace vicinal::VICINAL_ISA
