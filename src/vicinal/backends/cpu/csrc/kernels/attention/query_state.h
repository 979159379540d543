// The state of one query, for one group of heads, and the blocks of keys that it goes through.

namespace vicinal::VICINAL_ISA {

constexpr int kQueryBlock = 8;  // queries processed together, so that keys or values stay in L1

// A block of at most kBlockKeys keys of a slot list, and their cells, needed with a bias.
struct KeyBlock {
  const int32_t* slots = nullptr;  // [count], and padding or the keys of the next block
  const int32_t* cells = nullptr;  // [count], as `WindowCells` numbers them
  int64_t count = 0;
  int64_t n_own = 0;  // keys before those that also end the current block of the query's partner
};

// The block of a list that ends `blocks` full blocks before its end, so that lists with a common
// end have common blocks. Only the first block of a list may have fewer keys than kBlockKeys.
template <typename L>
KeyBlock block_from_end(const SlotList& list, const int32_t* cells, int64_t blocks) {
  static_assert(kListPadding % kKeyUnroll<L> == 0 && kBlockKeys % kKeyUnroll<L> == 0);
  const int64_t stop = std::max<int64_t>(list.count - blocks * kBlockKeys, 0);
  const int64_t begin = std::max<int64_t>(stop - kBlockKeys, 0);
  return {list.slots + begin, cells + begin, stop - begin, stop - begin};
}

inline int64_t count_blocks(const SlotList& list) {
  return (list.count + kBlockKeys - 1) / kBlockKeys;
}

// Tells the current blocks of both queries of a pair that they end with n_shared common keys, of
// which they may hold fewer. Too few are not worth products of both.
template <typename L>
void share_keys(KeyBlock& x, KeyBlock& y, int64_t n_shared) {
  n_shared = n_shared < kKeyUnroll<L> ? 0 : std::min({n_shared, x.count, y.count});
  x.n_own = x.count - n_shared;
  y.n_own = y.count - n_shared;
}

// The state of one query, for one group of heads.
template <typename L>
struct QueryState {
  using V = Vector<typename L::Real>;

  void allocate(const AttentionParams& p) {
    softmax.set_dropout(p.dropout);
    key_vectors = L::vectors_per_row(p.q.width);
    value_vectors = L::vectors_per_row(p.v.width);
    for (Buffer<V>* channels : {&q, &grad_q}) channels->reserve(key_vectors);
    for (Buffer<V>* channels : {&grad_out, &acc}) channels->reserve(value_vectors);
  }

  int64_t key_vectors = 0, value_vectors = 0;  // vectors per row of d and of dv channels
  int tile_index = 0;                          // index within the tile
  int64_t id = 0;                              // row of q
  KeyBlock block;                              // the current block of keys
  OnlineSoftmax<L> softmax;
  Buffer<V> q, grad_q;  // [key_vectors]; q is times the scale, grad_q is not
  Buffer<V> grad_out;   // [value_vectors]
  Buffer<V> acc;        // [value_vectors], accumulator of the output; backward: the output
};

}  // namespace vicinal::VICINAL_ISA
