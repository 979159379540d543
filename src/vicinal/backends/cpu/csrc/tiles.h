// Attention, for one instruction set: see vectors.h.
//
// A tile is a run of queries that are neighbors in space and so share most of the points they see.
// Heads are worked on group by group. The points' rows are packed once per tile and group, so that
// they stay in the cache; then query after query goes over its own, while bit by bit the rows for
// the next group are packed. The backward pass sums a tile's share of its points' gradients in rows
// like these before it adds it to the tensors; Schedule sees to it that each point gets its shares
// in one and the same order, for any number of threads.

namespace vicinal::VICINAL_ISA {

// Packed rows of a tile's points, or of the windows' cells, for one group of heads.
template <typename L>
class Table {
  using V = Vector<typename L::Real>;

 public:
  explicit Table(int64_t width) : vectors_(L::vectors(width)) {}

  // Makes room for `count` rows, and empties that of nobody.
  void reserve(int64_t count) {
    rows_.reserve(count * vectors_);
    std::fill_n(rows_.get(), vectors_, V{});
  }
  // Makes room for as many, and empties them all.
  void clear(int64_t count) {
    rows_.reserve(count * vectors_);
    std::fill_n(rows_.get(), count * vectors_, V{});
  }

  PackedRows<L> rows() { return {rows_.get(), vectors_}; }
  V* row(int64_t slot) { return rows().row(slot); }

 private:
  const int64_t vectors_;
  Buffer<V> rows_;
};

// A query under way, for one group of heads.
template <typename L>
struct Query {
  using V = Vector<typename L::Real>;

  void reserve(const Problem& p) {
    softmax.set(p.dropout);
    key_vectors = L::vectors(p.q.width);
    value_vectors = L::vectors(p.v.width);
    for (Buffer<V>* channels : {&vector, &sums}) channels->reserve(key_vectors);
    for (Buffer<V>* channels : {&grad_out, &value_sums}) channels->reserve(value_vectors);
  }

  int64_t key_vectors = 0, value_vectors = 0;
  int lane = 0;
  int64_t row = 0;
  Softmax<L> softmax;
  Buffer<V> vector, sums;          // times the scale; what its gradient sums up to
  Buffer<V> grad_out, value_sums;  // of its output; what that sums up to
};

constexpr int kRun = 8;    // queries that take turns, so that keys or values stay in the cache

template <typename L>
class Tile {
  using Real = typename L::Real;
  using V = Vector<Real>;

 public:
  explicit Tile(const Problem& problem)
      : p_(problem),
        b_(problem.background),
        near_(problem.queries, problem.tile_queries),
        empty_(problem.queries, problem.background, problem.tile_queries),
        packed_{{Table<L>(problem.q.width), Table<L>(problem.v.width)},
                {Table<L>(problem.q.width), Table<L>(problem.v.width)}},
        cells_(problem.q.width),
        grad_keys_(problem.q.width),
        grad_values_(problem.v.width),
        grad_cells_(problem.q.width),
        cell_value_(L::vectors(problem.v.width)) {
    for (Query<L>& query : queries_) query.reserve(problem);
  }

  void forward(int64_t tile) {
    find(tile);
    prefetch_queries(0, 0, {&p_.q, &p_.out});
    for (int64_t head = 0; head < p_.heads; head += L::kHeads) {
      begin_heads(head);
      for (int first = 0; first < p_.tile_queries; first += kRun) {
        const Part next = part(first, head + L::kHeads);
        prefetch_queries(first + kRun, head, {&p_.q, &p_.out});
        prefetch_points(next, {&p_.k, &p_.v});
        attend(first, head);
        pack_points(next);
      }
    }
  }

  // The queries' gradients, and this tile's share of all others, each group of heads in its turn;
  // item is the place of its chunk among the background's partial sums.
  void backward(int64_t tile, int64_t item, Schedule::Turn& turn, bool last_of_chunk) {
    find(tile);
    prefetch_queries(0, 0, {&p_.q, &p_.out, &p_.grad_out, &p_.grad_q});
    for (int64_t head = 0; head < p_.heads; head += L::kHeads) {
      begin_heads(head);
      grad_keys_.clear(near_.slot_count);
      grad_values_.clear(near_.slot_count);
      if (b_.active) grad_cells_.clear(1 + b_.slots);
      for (int first = 0; first < p_.tile_queries; first += kRun) {
        prefetch_queries(first + kRun, head, {&p_.q, &p_.out, &p_.grad_out, &p_.grad_q});
        prefetch_points(part(first, head), {&p_.grad_k, &p_.grad_v});
        const Part next = part(first, head + L::kHeads);
        prefetch_points(next, {&p_.k, &p_.v});
        differentiate(first, head, item);
        pack_points(next);
      }
      turn.wait(head);
      add_gradients(head, item);
      if (last_of_chunk) turn.finish(head + L::kHeads);
    }
  }

 private:
  // Some heads of some of the points.
  struct Part {
    int64_t head, first, stop;  // slots
  };
  // That of the run of queries that begins with `first`; none of heads that do not exist.
  Part part(int first, int64_t head) const {
    const int64_t runs = (p_.tile_queries + kRun - 1) / kRun, run = first / kRun;
    const int64_t points = head < p_.heads ? near_.slot_count - 1 : 0;
    return {head, 1 + run * points / runs, 1 + (run + 1) * points / runs};
  }

  void find(int64_t tile) {
    near_.find(tile, p_.query_mask);
    if (b_.active) empty_.find(near_);
    for (Packed& packed : packed_) {
      packed.keys.reserve(near_.slot_count);
      packed.values.reserve(near_.slot_count);
    }
    for (int first = 0; first < p_.tile_queries; first += kRun)
      prefetch_points(part(first, 0), {&p_.k, &p_.v});
    pack_points({0, 1, near_.slot_count});
  }

  // The heads whose points have been packed are the next to be worked on.
  void begin_heads(int64_t head) {
    std::swap(here_, next_);
    cells_.reserve(1 + b_.slots);
    for (int64_t cell = 0; cell < b_.slots; ++cell)
      pack<L>(b_.key, cell, head, 1, cells_.row(1 + cell));
  }

  // Asks for rows before they are needed, bit by bit, while there is enough else to do: those of
  // the queries whose turn is next, and a share of the points'.
  VICINAL_INLINE void prefetch_queries(int first, int64_t head,
                                       std::initializer_list<const Rows*> all) {
    if (first >= p_.tile_queries) first = 0, head += L::kHeads;
    const int64_t stop = std::min<int64_t>(first + kRun, p_.tile_queries);
    for (int64_t lane = first; head < p_.heads && lane < stop; ++lane)
      for (const Rows* rows : all)
        if (near_.rows[lane] >= 0) prefetch<L>(*rows, near_.rows[lane], head);
  }
  VICINAL_INLINE void prefetch_points(const Part& part,
                                      std::initializer_list<const Rows*> all) {
    for (int64_t slot = part.first; slot < part.stop; ++slot)
      for (const Rows* rows : all) prefetch<L>(*rows, near_.points[slot], part.head);
  }

  void pack_points(const Part& part) {
    const int32_t* points = &near_.points[part.first];
    const int64_t count = part.stop - part.first;
    pack_all<L>(p_.k, points, count, part.head, next_->keys.row(part.first));
    pack_all<L>(p_.v, points, count, part.head, next_->values.row(part.first));
  }

  // `touched` is atomic, since a chunk at other heads may look at it: it finds what it would find
  // before or after all the same.
  void add_gradients(int64_t head, int64_t item) {
    for (int64_t slot = 1; slot < near_.slot_count; ++slot) {
      const int64_t point = near_.points[slot];
      const bool first = __atomic_load_n(&p_.touched[point], __ATOMIC_RELAXED) <= head;
      if (first) __atomic_store_n(&p_.touched[point], head + 1, __ATOMIC_RELAXED);
      add<L>(grad_keys_.row(slot), p_.grad_k, point, head, first);
      add<L>(grad_values_.row(slot), p_.grad_v, point, head, first);
    }
    for (int64_t cell = 0; cell < b_.slots; ++cell)
      add<L>(grad_cells_.row(1 + cell), b_.grad_key_parts, item * b_.slots + cell, head);
  }

  // Calls body(query) for the queries of the tile that take turns, from the first on.
  template <typename Body>
  void for_run(int first, const Body& body) {
    for (int lane = first; lane < std::min<int64_t>(first + kRun, p_.tile_queries); ++lane) {
      if (near_.rows[lane] < 0) continue;
      Query<L>& query = queries_[lane - first];
      query.lane = lane;
      query.row = near_.rows[lane];
      body(query);
    }
  }

  // A part of a list, filled up: of `count` slots the first `seen` are real.
  struct Block {
    Block(const List& list, int64_t begin)
        : slots(list.slots + begin),
          seen(std::min<int64_t>(kBlock, list.count - begin)),
          count((seen + kStep<L> - 1) / kStep<L> * kStep<L>) {
      static_assert(kFill % kStep<L> == 0 && kBlock % kStep<L> == 0);
    }
    const int32_t* slots;
    const int64_t seen, count;
  };

  // Calls each of the bodies with (query, block) for all queries in turn, block after block.
  template <typename... Body>
  void for_blocks(int first, const Body&... body) {
    int64_t longest = 0;
    for_run(first, [&](auto& x) { longest = std::max(longest, near_.list(x.lane).count); });
    for (int64_t begin = 0; begin < longest; begin += kBlock)
      (for_run(first, [&](auto& x) {
        const List list = near_.list(x.lane);
        if (begin < list.count) body(x, Block(list, begin));
      }), ...);
  }

  void attend(int first, int64_t head) {
    for_run(first, [&](auto& x) {
      pack<L>(p_.q, x.row, head, p_.scale, x.vector.get());
      std::fill_n(x.value_sums.get(), x.value_vectors, V{});
      x.softmax.begin(x.row, head);
    });
    for_blocks(
        first,
        [&](auto& x, const Block& block) {
          multiply<L>(here_->keys.rows(), block.slots, block.count, x.vector.get(),
                      x.softmax.logits);
        },
        [&](auto& x, const Block& block) {
          weigh(x, block, [&](int64_t u) { return near_.points[block.slots[u]]; });
        },
        [&](auto& x, const Block& block) {
          accumulate<L>(x.softmax.logits, block.slots, block.count, here_->values.rows(),
                        x.value_sums.get());
        });
    for_run(first, [&](auto& x) {
      attend_to_cells(x, head);
      finish(x, head);
    });
  }

  template <typename Column>
  void weigh(Query<L>& x, const Block& block, const Column& column_of) {
    const V shrink = x.softmax.weigh(block.seen, block.count, column_of);
    for (int64_t j = 0; j < x.value_vectors; ++j) x.value_sums[j] *= shrink;
  }

  void finish(Query<L>& x, int64_t head) {
    const V total = x.softmax.total();
    const V inverse = total == 0 ? V{} : 1 / total;
    for (int64_t j = 0; j < x.value_vectors; ++j) x.value_sums[j] *= inverse;
    unpack<L>(x.value_sums.get(), 1, p_.out, x.row, head);
    const V lse = x.softmax.lse(total);
    for (int g = 0; g < L::kHeads; ++g)
      static_cast<Real*>(p_.lse)[x.row * p_.heads + head + g] = lse[g];
  }

  void differentiate(int first, int64_t head, int64_t item) {
    for_run(first, [&](auto& x) {
      pack<L>(p_.q, x.row, head, p_.scale, x.vector.get());
      pack<L>(p_.grad_out, x.row, head, 1, x.grad_out.get());
      resume_softmax(x, head);
      std::fill_n(x.sums.get(), x.key_vectors, V{});
    });
    for_blocks(
        first,
        [&](auto& x, const Block& block) {
          multiply<L>(here_->values.rows(), block.slots, block.count, x.grad_out.get(),
                      x.softmax.products);
        },
        [&](auto& x, const Block& block) {
          multiply<L>(here_->keys.rows(), block.slots, block.count, x.vector.get(),
                      x.softmax.logits);
          x.softmax.differentiate(block.seen, block.count,
                                  [&](int64_t u) { return near_.points[block.slots[u]]; });
        },
        [&](auto& x, const Block& block) {
          accumulate<L>(x.softmax.logits, block.slots, block.count, here_->keys.rows(),
                        x.sums.get());
        },
        [&](auto& x, const Block& block) {
          distribute<L>(x.softmax.logits, block.slots, block.count, x.vector.get(),
                        grad_keys_.rows());
        },
        [&](auto& x, const Block& block) {
          distribute<L>(x.softmax.products, block.slots, block.count, x.grad_out.get(),
                        grad_values_.rows());
        });
    for_run(first, [&](auto& x) {
      unpack<L>(x.sums.get(), p_.scale, p_.grad_q, x.row, head);
      for (int64_t level = 0; level < b_.levels; ++level) differentiate_cells(x, level, head, item);
    });
  }

  void resume_softmax(Query<L>& x, int64_t head) {
    const int64_t at = x.row * p_.heads + head;
    pack<L>(p_.out, x.row, head, 1, x.value_sums.get());
    const V delta = dot<L>(x.value_sums.get(), x.grad_out.get(), x.value_vectors) -
                    per_head<L>(static_cast<const Real*>(p_.grad_lse) + at);
    x.softmax.resume(x.row, head, per_head<L>(static_cast<const Real*>(p_.lse) + at), delta);
  }

  // Empty cells are neighbors like others, but for this: a query sees those of a level by a vector
  // of its own (its rotation holds where the window lies), and they all have one value.
  void attend_to_cells(Query<L>& x, int64_t head) {
    for (int64_t level = 0; level < b_.levels; ++level) {
      load_level(x, level, head);
      for_cells(x, level, [&](const Block& block) {
        multiply<L>(cells_.rows(), block.slots, block.count, x.vector.get(), x.softmax.logits);
        weigh(x, block, [&](int64_t u) { return cell_column(block.slots[u]); });
        const V mass = sum<L>(x.softmax.logits, block.count);
        for (int64_t j = 0; j < x.value_vectors; ++j)
          x.value_sums[j] += mass == 0 ? V{} : mass * cell_value_[j];
      });
    }
  }

  void differentiate_cells(Query<L>& x, int64_t level, int64_t head, int64_t item) {
    load_level(x, level, head);
    const V product = dot<L>(cell_value_.get(), x.grad_out.get(), x.value_vectors);
    V mass{};
    std::fill_n(x.sums.get(), x.key_vectors, V{});
    for_cells(x, level, [&](const Block& block) {
      multiply<L>(cells_.rows(), block.slots, block.count, x.vector.get(), x.softmax.logits);
      std::fill_n(x.softmax.products, block.count / L::kSpan, product);
      x.softmax.differentiate(block.seen, block.count,
                              [&](int64_t u) { return cell_column(block.slots[u]); });
      mass += sum<L>(x.softmax.products, block.count);
      accumulate<L>(x.softmax.logits, block.slots, block.count, cells_.rows(), x.sums.get());
      distribute<L>(x.softmax.logits, block.slots, block.count, x.vector.get(),
                    grad_cells_.rows());
    });
    unpack<L>(x.sums.get(), p_.scale, b_.grad_query, x.row * b_.levels + level, head);
    const int64_t image = empty_.images[x.lane];
    if (image < 0) return;
    for (int64_t j = 0; j < x.value_vectors; ++j)
      cell_value_[j] = mass == 0 ? V{} : mass * x.grad_out[j];
    const int64_t row = (item * b_.images + image) * b_.levels + level;
    add<L>(cell_value_.get(), b_.grad_value_parts, row, head);
  }

  // What a query's empty cells of a level share: the vector that sees them, and their value.
  void load_level(Query<L>& x, int64_t level, int64_t head) {
    pack<L>(b_.query, x.row * b_.levels + level, head, p_.scale, x.vector.get());
    std::fill_n(cell_value_.get(), x.value_vectors, V{});
    const int64_t image = empty_.images[x.lane];
    if (image >= 0) pack<L>(b_.value, image * b_.levels + level, head, 1, cell_value_.get());
  }

  template <typename Body>
  void for_cells(const Query<L>& x, int64_t level, const Body& body) {
    const List cells = empty_.list(x.lane, level);
    for (int64_t begin = 0; begin < cells.count; begin += kBlock) body(Block(cells, begin));
  }

  // Columns of cells come after those of the points.
  int64_t cell_column(int32_t slot) const { return p_.queries.points + slot - 1; }

  const Problem& p_;
  const Background& b_;
  Neighbors near_;
  EmptyCells empty_;
  struct Packed {
    Table<L> keys, values;
  };
  Packed packed_[2];  // points for the heads at work, and for those that come next
  Packed *here_ = packed_, *next_ = packed_ + 1;
  Table<L> cells_, grad_keys_, grad_values_, grad_cells_;
  Query<L> queries_[kRun];  // those that take turns
  Buffer<V> cell_value_;
};

template <typename L>
void attend_with(const Problem& problem, Work& work) {
  Tile<L> tiles(problem);
  for (int64_t tile = work.take(); tile < work.items(); tile = work.take()) tiles.forward(tile);
}

template <typename L>
void attend_backward_with(const Problem& problem, Schedule& schedule) {
  Tile<L> tiles(problem);
  for (int64_t turn = schedule.take(); turn < schedule.chunks; turn = schedule.take()) {
    const int64_t chunk = schedule.chunk_at(turn);
    Schedule::Turn under_way(schedule, turn);
    const int64_t stop = std::min((chunk + 1) * schedule.tiles_per_chunk, schedule.tiles);
    for (int64_t tile = chunk * schedule.tiles_per_chunk; tile < stop; ++tile)
      tiles.backward(tile, chunk, under_way, tile + 1 == stop);
  }
}

// Calls body with the layout in which a row takes about four vectors: as many heads side by side as
// fit, so that no lane is idle.
template <typename Real, typename Body>
void with_heads(const Problem& p, const Body& body) {
  constexpr int kLanes = n_lanes<Real>;
  const int64_t width = std::max(p.q.width, p.v.width);
  const auto fits = [&](int heads) {
    return p.heads % heads == 0 && heads * width <= 4 * kLanes;
  };
  if constexpr (kLanes >= 8)
    if (fits(4)) return body(Layout<Real, 4>());
  if constexpr (kLanes >= 4)
    if (fits(2)) return body(Layout<Real, 2>());
  body(Layout<Real, 1>());
}

template <typename Body>
void with_layout(const Problem& p, const Body& body) {
  if (p.q.storage == Storage::float64) with_heads<double>(p, body);
  else with_heads<float>(p, body);
}

// One thread's share of the work.
inline void attend(const Problem& problem, Work& work) {
  if (problem.heads == 0) return;
  with_layout(problem, [&](auto layout) { attend_with<decltype(layout)>(problem, work); });
}

inline void attend_backward(const Problem& problem, Schedule& schedule) {
  if (problem.heads == 0) return;
  with_layout(problem, [&](auto layout) {
    attend_backward_with<decltype(layout)>(problem, schedule);
  });
}

}  // namespace vicinal::VICINAL_ISA
