// The attention kernels, forward and backward. See kernels.h for how it is included.
//
// The unit of work is a tile: consecutive queries of the traversal. They are neighbors in space, so
// they share most of their points. For each group of kHeads heads, the keys and values of the
// tile's points are packed once, into buffers that stay in the cache. Each query then gathers its
// own rows from them by slot (see tile_neighbors.h), block by block with an online softmax. Rows
// that both queries of a pair need are loaded once for both. The buffers are double-buffered: while
// one group of heads is processed, the rows of the next are packed.
//
// The backward pass accumulates the gradients of a tile's points in packed buffers as well, then
// adds them to the tensors. BackwardSchedule fixes the order of those additions.

namespace vicinal::VICINAL_ISA {

template <typename L>
class AttentionKernel {
  using Real = typename L::Real;
  using V = Vector<Real>;

 public:
  // `queries` are the tensors of queries that the pass reads or writes, to be prefetched.
  AttentionKernel(const AttentionParams& params, std::array<const Rows*, 4> queries)
      : p_(params),
        background_(params.background),
        n_background_levels_(params.background.active ? params.windows.n_levels : 0),
        n_background_cells_(params.background.active ? params.windows.n_cells : 0),
        n_bias_cells_(params.bias.active ? params.windows.n_cells : 0),
        neighbors_(params.slices, params.tile_queries),
        empty_cells_(params.slices, params.windows, params.background, params.tile_queries),
        window_cells_(params.slices, params.windows, params.tile_queries),
        prefetches_(params, neighbors_, queries),
        kv_buffers_{{PackedTile<L>(params.q.width), PackedTile<L>(params.v.width)},
                    {PackedTile<L>(params.q.width), PackedTile<L>(params.v.width)}},
        cell_keys_(params.q.width),
        grad_keys_(params.q.width),
        grad_values_(params.v.width),
        grad_cell_keys_(params.q.width),
        bias_(1),
        grad_bias_(1),
        cell_value_(L::vectors_per_row(params.v.width)) {
    for (QueryState<L>& query : queries_) query.allocate(params);
  }

  void forward(int64_t tile) {
    load(tile);
    for (int64_t head = 0; head < p_.n_heads; head += L::kHeads) {
      begin_heads(head);
      for (int first = 0; first < p_.tile_queries; first += kQueryBlock) {
        prefetches_.begin(first, head, {}, 3 * kQueryBlock);
        forward_block(first, head);
        prefetches_.finish();
        pack_points(prefetches_.slot_range(first, head + L::kHeads));
      }
    }
  }

  // Computes grad_q of a tile, and adds its contributions to all other gradients. `chunk` is the
  // chunk of the tile, with its own partial sums of the background's gradients.
  void backward(int64_t tile, int64_t chunk, BackwardSchedule::Ticket& ticket, bool last_of_chunk) {
    load(tile);
    for (int64_t head = 0; head < p_.n_heads; head += L::kHeads) {
      begin_heads(head);
      grad_keys_.resize_zeros(neighbors_.n_slots);
      grad_values_.resize_zeros(neighbors_.n_slots);
      if (background_.active) grad_cell_keys_.resize_zeros(1 + n_background_cells_);
      if (p_.bias.active) grad_bias_.resize_zeros(1 + n_bias_cells_);
      for (int first = 0; first < p_.tile_queries; first += kQueryBlock) {
        prefetches_.begin(first, head, prefetches_.slot_range(first, head), 6 * kQueryBlock);
        backward_block(first, head, chunk);
        prefetches_.finish();
        pack_points(prefetches_.slot_range(first, head + L::kHeads));
      }
      ticket.wait(head);
      scatter_add_gradients(head, chunk);
      if (last_of_chunk) ticket.release(head + L::kHeads);
    }
  }

 private:
  void load(int64_t tile) {
    neighbors_.load_points(tile, p_.query_mask);
    prefetches_.prefetch_points({0, 1, neighbors_.n_slots});
    neighbors_.write_lists();
    if (background_.active) empty_cells_.load(neighbors_);
    if (p_.bias.active) window_cells_.load(neighbors_);
    for (KeyValueBuffer& buffer : kv_buffers_) {
      buffer.keys.resize(neighbors_.n_slots);
      buffer.values.resize(neighbors_.n_slots);
    }
    pack_points({0, 1, neighbors_.n_slots});
    prefetches_.prefetch_points(prefetches_.slot_range(0, L::kHeads));
  }

  // Swaps the double buffer: the heads packed last become the current ones.
  void begin_heads(int64_t head) {
    std::swap(current_kv_, next_kv_);
    cell_keys_.resize(1 + n_background_cells_);
    for (int64_t cell = 0; cell < n_background_cells_; ++cell)
      pack_row<L>(background_.key, cell, head, 1, cell_keys_.row(1 + cell));
    bias_.resize(1 + n_bias_cells_);
    for (int64_t cell = 0; cell < n_bias_cells_; ++cell)
      pack_row<L>(p_.bias.bias, cell, head, 1, bias_.row(1 + cell));
  }

  // Packs keys and values into the next buffer.
  void pack_points(const SlotRange& range) {
    const int32_t* ids = &neighbors_.point_ids[range.first];
    const int64_t count = range.stop - range.first;
    pack_rows<L>(p_.k, ids, count, range.head, next_kv_->keys.row(range.first));
    pack_rows<L>(p_.v, ids, count, range.head, next_kv_->values.row(range.first));
  }

  // Adds the packed gradients to the tensors. heads_written is atomic, since another chunk may
  // access it for other heads. The comparison gives the same result before and after that store.
  void scatter_add_gradients(int64_t head, int64_t chunk) {
    for (int64_t slot = 1; slot < neighbors_.n_slots; ++slot) {
      const int64_t point = neighbors_.point_ids[slot];
      int32_t* const heads_written = &p_.heads_written[point];
      const bool overwrite = __atomic_load_n(heads_written, __ATOMIC_RELAXED) <= head;
      if (overwrite) __atomic_store_n(heads_written, head + 1, __ATOMIC_RELAXED);
      add_row<L>(grad_keys_.row(slot), p_.grad_k, point, head, overwrite);
      add_row<L>(grad_values_.row(slot), p_.grad_v, point, head, overwrite);
    }
    const int64_t first_row = chunk * n_background_cells_;
    for (int64_t cell = 0; cell < n_background_cells_; ++cell)
      add_row<L>(grad_cell_keys_.row(1 + cell), background_.grad_key_parts, first_row + cell, head);
    for (int64_t cell = 0; cell < n_bias_cells_; ++cell)
      add_row<L>(grad_bias_.row(1 + cell), p_.bias.grad_parts, chunk * n_bias_cells_ + cell, head);
  }

  // Calls body(query) for the queries of the block from `first` on.
  template <typename Body>
  void for_queries(int first, const Body& body) {
    for (int i = first; i < std::min<int64_t>(first + kQueryBlock, p_.tile_queries); ++i) {
      if (neighbors_.query_ids[i] < 0) continue;
      QueryState<L>& query = queries_[i - first];
      query.tile_index = i;
      query.id = neighbors_.query_ids[i];
      body(query);
    }
  }

  // Calls body(x, y) for pairs of queries of the block from `first` on.
  template <typename Body>
  void for_pairs(int first, const Body& body) {
    const int64_t stop = std::min<int64_t>(first + kQueryBlock, p_.tile_queries);
    for (int i = 0; first + i + 1 < stop; i += 2) body(queries_[i], queries_[i + 1]);
  }

  // Runs the stages for each block of keys of the query block, which becomes the current block of
  // each query: stages().
  template <typename Stages>
  void for_key_blocks(int first, const Stages& stages) {
    int64_t n_blocks = 0;
    for_queries(first, [&](auto& x) {
      n_blocks = std::max(n_blocks, count_blocks(neighbors_.list(x.tile_index)));
    });
    for (int64_t block = n_blocks - 1; block >= 0; --block) {
      for (QueryState<L>& x : queries_) x.block = {};
      for_queries(first, [&](auto& x) {
        const SlotList list = neighbors_.list(x.tile_index);
        const int32_t* cells = p_.bias.active ? window_cells_.list(x.tile_index) : list.slots;
        x.block = block_from_end<L>(list, cells, block);
      });
      for_pairs(first, [&](auto& x, auto& y) {
        share_keys<L>(x.block, y.block, neighbors_.shared_count(y.tile_index) - block * kBlockKeys);
      });
      stages();
    }
  }

  // Calls stage(query) for each query that has a current block of keys.
  template <typename Stage>
  void for_blocks(int first, const Stage& stage) {
    for_queries(first, [&](auto& x) {
      prefetches_.step();
      if (x.block.count > 0) stage(x);
    });
  }

  // The keys of a query's current block from `first` on.
  struct KeysOf {
    // Of a buffer of the block, vectors of [kLanesPerHead keys, kHeads heads].
    Real* in(V* buffer) const { return reinterpret_cast<Real*>(buffer) + first * L::kHeads; }
    QueryState<L>& x;
    int64_t first;
  };

  // Calls product(slots, count, keys...) for the keys that a single query has, and then for those
  // that two queries share, which are at different places of their blocks.
  template <typename Product>
  static void for_own_keys(QueryState<L>& x, const Product& product) {
    if (x.block.n_own > 0) product(x.block.slots, x.block.n_own, KeysOf{x, 0});
  }
  template <typename Product>
  void for_keys(int first, const Product& product) {
    for_queries(first, [&](auto& x) {
      prefetches_.step();
      for_own_keys(x, product);
    });
    for_pairs(first, [&](auto& x, auto& y) {
      const int64_t own = x.block.n_own, n_shared = x.block.count - own;
      if (n_shared > 0)
        product(x.block.slots + own, n_shared, KeysOf{x, own}, KeysOf{y, y.block.n_own});
    });
  }

  // The column number of a key for dropout. Empty cells are numbered after the points.
  auto point_column(const QueryState<L>& x) const {
    return [this, slots = x.block.slots](int64_t key) {
      return p_.dropout.column_of(neighbors_.point_ids[slots[key]]);
    };
  }
  auto cell_column(const QueryState<L>& x) const {
    const uint32_t first_cell = p_.dropout.column_of(p_.slices.n_points);
    return [first_cell, slots = x.block.slots](int64_t key) { return first_cell + slots[key] - 1; };
  }

  // Products with the rows of keys or values, as for_keys calls them.
  static auto dots_with_q(const PackedRows<L>& keys) {
    return [=](const int32_t* slots, int64_t count, auto... part) {
      gather_dot<L, sizeof...(part)>(keys, slots, count, {part.x.q.get()...},
                                     {part.in(part.x.softmax.logits)...});
    };
  }
  static auto add_to_grad_q(const PackedRows<L>& keys) {
    return [=](const int32_t* slots, int64_t count, auto... part) {
      gather_weighted_sum<L, sizeof...(part)>({part.in(part.x.softmax.logits)...}, slots, count,
                                              keys, {part.x.grad_q.get()...});
    };
  }
  static auto add_to_grad_keys(const PackedRows<L>& grad_keys) {
    return [=](const int32_t* slots, int64_t count, auto... part) {
      scatter_add_outer<L, sizeof...(part)>({part.in(part.x.softmax.logits)...}, slots, count,
                                            {part.x.q.get()...}, grad_keys);
    };
  }

  void add_bias(QueryState<L>& x) {
    if (!p_.bias.active) return;
    Real* const logits = reinterpret_cast<Real*>(x.softmax.logits);  // [count, kHeads]
    for (int64_t key = 0; key < x.block.count; ++key) {
      const Real* const bias = reinterpret_cast<const Real*>(bias_.row(x.block.cells[key]));
      for (int g = 0; g < L::kHeads; ++g) logits[key * L::kHeads + g] += bias[g];
    }
  }

  // Adds the gradients of logits, which the softmax left in their place, to those of the bias.
  void add_bias_gradients(const QueryState<L>& x) {
    if (!p_.bias.active) return;
    const Real* const grad_logits = reinterpret_cast<const Real*>(x.softmax.logits);
    for (int64_t key = 0; key < x.block.count; ++key) {
      Real* const grad_bias = reinterpret_cast<Real*>(grad_bias_.row(x.block.cells[key]));
      for (int g = 0; g < L::kHeads; ++g) grad_bias[g] += grad_logits[key * L::kHeads + g];
    }
  }

  template <typename ColumnOf>
  void update_softmax(QueryState<L>& x, const ColumnOf& column_of) {
    add_bias(x);
    const V rescale = x.softmax.update(x.block.count, column_of);
    for (int64_t j = 0; j < x.value_vectors; ++j) x.acc[j] *= rescale;
  }
  template <typename ColumnOf>
  void backward_softmax(QueryState<L>& x, const ColumnOf& column_of) {
    add_bias(x);
    x.softmax.backward(x.block.count, column_of);
    add_bias_gradients(x);
  }

  void forward_block(int first, int64_t head) {
    for_queries(first, [&](auto& x) {
      pack_row<L>(p_.q, x.id, head, p_.scale, x.q.get());
      std::fill_n(x.acc.get(), x.value_vectors, V{});
      x.softmax.begin_forward(x.id, head);
    });
    const PackedRows<L> keys = current_kv_->keys.rows(), values = current_kv_->values.rows();
    for_key_blocks(first, [&] {
      for_keys(first, dots_with_q(keys));
      for_blocks(first, [&](auto& x) { update_softmax(x, point_column(x)); });
      for_keys(first, [&](const int32_t* slots, int64_t count, auto... part) {
        gather_weighted_sum<L, sizeof...(part)>({part.in(part.x.softmax.logits)...}, slots, count,
                                                values, {part.x.acc.get()...});
      });
    });
    for_queries(first, [&](auto& x) {
      for (int64_t level = 0; level < n_background_levels_; ++level) forward_cells(x, level, head);
      write_output(x, head);
    });
  }

  // Normalizes the accumulator and writes out and lse.
  void write_output(QueryState<L>& x, int64_t head) {
    const V row_sum = x.softmax.row_sum();
    const V inverse = row_sum == 0 ? V{} : 1 / row_sum;
    for (int64_t j = 0; j < x.value_vectors; ++j) x.acc[j] *= inverse;
    unpack_row<L>(x.acc.get(), 1, p_.out, x.id, head);
    const V lse = x.softmax.lse(row_sum);
    for (int g = 0; g < L::kHeads; ++g)
      static_cast<Real*>(p_.lse)[x.id * p_.n_heads + head + g] = lse[g];
  }

  void backward_block(int first, int64_t head, int64_t chunk) {
    for_queries(first, [&](auto& x) { begin_backward(x, head); });
    const PackedRows<L> keys = current_kv_->keys.rows(), values = current_kv_->values.rows();
    for_key_blocks(first, [&] {
      for_keys(first, [&](const int32_t* slots, int64_t count, auto... part) {
        gather_dot<L, sizeof...(part)>(values, slots, count, {part.x.grad_out.get()...},
                                       {part.in(part.x.softmax.grad_probs)...});
      });
      for_keys(first, dots_with_q(keys));
      for_blocks(first, [&](auto& x) { backward_softmax(x, point_column(x)); });
      for_keys(first, add_to_grad_q(keys));
      for_keys(first, add_to_grad_keys(grad_keys_.rows()));
      for_keys(first, [&](const int32_t* slots, int64_t count, auto... part) {
        scatter_add_outer<L, sizeof...(part)>({part.in(part.x.softmax.grad_probs)...}, slots, count,
                                              {part.x.grad_out.get()...}, grad_values_.rows());
      });
    });
    for_queries(first, [&](auto& x) {
      unpack_row<L>(x.grad_q.get(), p_.scale, p_.grad_q, x.id, head);
      for (int64_t level = 0; level < n_background_levels_; ++level)
        backward_cells(x, level, head, chunk);
    });
  }

  // Loads q and grad_out, and starts the softmax with lse and
  // delta = rowsum(out * grad_out) - grad_lse.
  void begin_backward(QueryState<L>& x, int64_t head) {
    pack_row<L>(p_.q, x.id, head, p_.scale, x.q.get());
    pack_row<L>(p_.grad_out, x.id, head, 1, x.grad_out.get());
    pack_row<L>(p_.out, x.id, head, 1, x.acc.get());
    const int64_t index = x.id * p_.n_heads + head;
    const V lse = broadcast_heads<L>(static_cast<const Real*>(p_.lse) + index);
    const V delta = dot<L>(x.acc.get(), x.grad_out.get(), x.value_vectors) -
                    broadcast_heads<L>(static_cast<const Real*>(p_.grad_lse) + index);
    x.softmax.begin_backward(x.id, head, lse, delta);
    std::fill_n(x.grad_q.get(), x.key_vectors, V{});
  }

  // Empty cells are additional keys, with two differences: each level has its own query vector
  // (rotated relative to the window), and all cells of a level and image share one value.
  void forward_cells(QueryState<L>& x, int64_t level, int64_t head) {
    load_level(x, level, head);
    for_cell_blocks(x, level, [&] {
      for_own_keys(x, dots_with_q(cell_keys_.rows()));
      update_softmax(x, cell_column(x));
      const V prob_sum = sum_keys<L>(x.softmax.logits, x.block.count);
      for (int64_t j = 0; j < x.value_vectors; ++j)
        x.acc[j] += prob_sum == 0 ? V{} : prob_sum * cell_value_[j];
    });
  }

  void backward_cells(QueryState<L>& x, int64_t level, int64_t head, int64_t chunk) {
    load_level(x, level, head);
    const V grad_prob = dot<L>(cell_value_.get(), x.grad_out.get(), x.value_vectors);
    V prob_sum{};
    std::fill_n(x.grad_q.get(), x.key_vectors, V{});
    for_cell_blocks(x, level, [&] {
      for_own_keys(x, dots_with_q(cell_keys_.rows()));
      std::fill_n(x.softmax.grad_probs, n_vectors<L>(x.block.count), grad_prob);
      backward_softmax(x, cell_column(x));
      prob_sum += sum_keys<L>(x.softmax.grad_probs, x.block.count);
      for_own_keys(x, add_to_grad_q(cell_keys_.rows()));
      for_own_keys(x, add_to_grad_keys(grad_cell_keys_.rows()));
    });
    const int64_t row = x.id * n_background_levels_ + level;
    unpack_row<L>(x.grad_q.get(), p_.scale, background_.grad_query, row, head);
    add_cell_value_gradient(x, level, head, chunk, prob_sum);
  }

  void add_cell_value_gradient(const QueryState<L>& x, int64_t level, int64_t head, int64_t chunk,
                               V prob_sum) {
    const int64_t image = empty_cells_.image_ids[x.tile_index];
    if (image < 0) return;
    const V* grad_out = x.grad_out.get();
    for (int64_t j = 0; j < x.value_vectors; ++j)
      cell_value_[j] = prob_sum == 0 ? V{} : prob_sum * grad_out[j];
    const int64_t row = (chunk * background_.n_images + image) * n_background_levels_ + level;
    add_row<L>(cell_value_.get(), background_.grad_value_parts, row, head);
  }

  // Loads the query vector and the value for the empty cells of a level.
  void load_level(QueryState<L>& x, int64_t level, int64_t head) {
    const int64_t n_levels = n_background_levels_;
    pack_row<L>(background_.query, x.id * n_levels + level, head, p_.scale, x.q.get());
    std::fill_n(cell_value_.get(), x.value_vectors, V{});
    const int64_t image = empty_cells_.image_ids[x.tile_index];
    if (image >= 0)
      pack_row<L>(background_.value, image * n_levels + level, head, 1, cell_value_.get());
  }

  // Calls body() for each block of a level's empty cells, which becomes the query's current block.
  template <typename Body>
  void for_cell_blocks(QueryState<L>& x, int64_t level, const Body& body) {
    const SlotList cells = empty_cells_.list(x.tile_index, level);
    for (int64_t block = count_blocks(cells) - 1; block >= 0; --block) {
      x.block = block_from_end<L>(cells, cells.slots, block);
      body();
    }
  }

  const AttentionParams& p_;
  const BackgroundParams& background_;
  const int64_t n_background_levels_, n_background_cells_;  // L, K; zero without a background
  const int64_t n_bias_cells_;                              // K; zero without a bias
  TileNeighbors neighbors_;
  EmptyCells empty_cells_;
  WindowCells window_cells_;
  TilePrefetches<L> prefetches_;
  struct KeyValueBuffer {
    PackedTile<L> keys, values;  // [n_slots, key_vectors], [n_slots, value_vectors]
  };
  KeyValueBuffer kv_buffers_[2];
  KeyValueBuffer *current_kv_ = kv_buffers_, *next_kv_ = kv_buffers_ + 1;
  PackedTile<L> cell_keys_;       // [1 + K, key_vectors]
  PackedTile<L> grad_keys_;       // [n_slots, key_vectors]
  PackedTile<L> grad_values_;     // [n_slots, value_vectors]
  PackedTile<L> grad_cell_keys_;  // [1 + K, key_vectors]
  PackedTile<L> bias_, grad_bias_;  // [1 + K, 1], of each row the first kHeads lanes
  QueryState<L> queries_[kQueryBlock];
  Buffer<V> cell_value_;  // [value_vectors], of the current query and level, or its gradient
};

template <typename L>
void attention_forward_with(const AttentionParams& params, WorkQueue& queue) {
  AttentionKernel<L> kernel(params, {&params.q, &params.out});
  for (int64_t chunk = queue.take(); chunk < queue.n_chunks; chunk = queue.take())
    for (int64_t tile = queue.begin(chunk); tile < queue.end(chunk); ++tile) kernel.forward(tile);
}

template <typename L>
void attention_backward_with(const AttentionParams& params, BackwardSchedule& schedule) {
  AttentionKernel<L> kernel(params, {&params.q, &params.out, &params.grad_out, &params.grad_q});
  for (int64_t i = schedule.take(); i < schedule.n_chunks; i = schedule.take()) {
    const int64_t chunk = schedule.chunk_of(i);
    BackwardSchedule::Ticket ticket(schedule, i);
    const int64_t stop = std::min((chunk + 1) * schedule.tiles_per_chunk, schedule.n_tiles);
    for (int64_t tile = chunk * schedule.tiles_per_chunk; tile < stop; ++tile)
      kernel.backward(tile, chunk, ticket, tile + 1 == stop);
  }
}

// Calls body with the PackedLayout that interleaves the most heads (1, 2 or 4) whose row fits in
// kRowBytes: there are few sums across lanes, and narrow heads leave no lane idle. Four heads fill
// a vector of 16 bytes, which then needs no sum across lanes at all.
template <typename Real, typename Body>
void dispatch_heads(const AttentionParams& p, const Body& body) {
  constexpr int kLanes = n_lanes<Real>;
  const int64_t width = std::max(p.q.width, p.v.width);
  const auto fits = [&](int heads) {
    return p.n_heads % heads == 0 && heads * width * int64_t(sizeof(Real)) <= kRowBytes;
  };
  if constexpr (kLanes >= (kHas32Registers ? 4 : 8))
    if (fits(4)) return body(PackedLayout<Real, 4>());
  if constexpr (kLanes >= 4)
    if (fits(2)) return body(PackedLayout<Real, 2>());
  body(PackedLayout<Real, 1>());
}

template <typename Body>
void dispatch_layout(const AttentionParams& p, const Body& body) {
  if (p.n_heads == 0) return;
  if (p.q.dtype == Dtype::float64) dispatch_heads<double>(p, body);
  else dispatch_heads<float>(p, body);
}

// Entry points. Every thread calls one with the same queue or schedule.
inline void attention_forward(const AttentionParams& params, WorkQueue& queue) {
  dispatch_layout(params, [&](auto layout) {
    attention_forward_with<decltype(layout)>(params, queue);
  });
}

inline void attention_backward(const AttentionParams& params, BackwardSchedule& schedule) {
  dispatch_layout(params, [&](auto layout) {
    attention_backward_with<decltype(layout)>(params, schedule);
  });
}

}  // namespace vicinal::VICINAL_ISA
