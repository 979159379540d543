// Attention, for one instruction set: see cpu_vectors.h.
//
// A tile is as many queries as a vector has lanes. They are neighbors in space and so share most of
// the points they see. The tile walks the union of these, one point at a time broadcast against all
// lanes, with a bit per lane for who sees it. So sums over channels run down the lanes, never
// across, and the inner loops are those of a matrix product. The backward pass computes a tile's
// weights once and adds the tile's share to its points' gradients; Schedule sees to it that each
// point gets its shares in one and the same order, for any number of threads and without atomics.

namespace vicinal::VICINAL_ISA {

template <typename Real>
inline Vector<Real> kept_weight(const Dropout& dropout, Bits<Real> key) {
  return mix(key) >= dropout.threshold ? Vector<Real>{} + Real(dropout.keep_scale) : Vector<Real>{};
}

template <typename T>
class Tile {
  using Real = typename SumType<T>::type;
  using V = Vector<Real>;
  using B = Bits<Real>;
  static constexpr int kLanes = n_lanes<Real>;

 public:
  explicit Tile(const Problem& problem)
      : p_(problem),
        slices_(problem.queries),
        lane_width_((problem.q.width + kLanes - 1) / kLanes * kLanes),
        lane_value_width_((problem.v.width + kLanes - 1) / kLanes * kLanes),
        near_(slices_),
        row_copies_(std::is_same_v<T, Real> ? 0 : kBlock * problem.q.width),
        value_row_copies_(std::is_same_v<T, Real> ? 0 : kBlock * problem.v.width),
        logits_(kBlock),
        products_(kBlock),
        columns_(problem.q.width),
        value_columns_(problem.v.width),
        sums_(problem.q.width),
        value_sums_(problem.v.width),
        before_(std::max(problem.q.width, problem.v.width)),
        query_rows_(kLanes * lane_width_),
        grad_rows_(kLanes * lane_value_width_),
        empty_(problem.background.slots),
        cell_query_rows_(kLanes * lane_width_),
        cell_columns_(problem.q.width),
        cell_values_(problem.v.width),
        cell_sums_(problem.q.width) {}

  void forward(int64_t tile) {
    near_.find(tile, p_.query_mask);
    if (p_.background.active) find_empty_cells();
    for (int64_t head = 0; head < p_.heads; ++head) {
      load_columns(p_.q, head, near_.rows, columns_.get(), p_.scale);
      fill(value_sums_.get(), p_.v.width);
      top_ = V{} - std::numeric_limits<Real>::infinity();
      total_ = V{};
      const B row_key = query_keys(head);
      for (int64_t begin = 0; begin < near_.count; begin += kBlock) {
        const int64_t count = std::min<int64_t>(kBlock, near_.count - begin);
        find_rows(p_.k, head, &near_.ids[begin], count, row_copies_.get(), rows_);
        find_rows(p_.v, head, &near_.ids[begin], count, value_row_copies_.get(), value_rows_);
        multiply(rows_, count, p_.q.width, columns_.get(), logits_.get());
        softmax_step(&near_.seers[begin], count, [&](int64_t u) {
          return row_key ^ uint32_t(near_.ids[begin + u]);
        });
        add_rows(logits_.get(), &near_.seers[begin], value_rows_, count, p_.v.width,
                 value_sums_.get());
      }
      if (p_.background.active) attend_background(head, row_key);
      finish(head);
    }
  }

  // All gradients; item is the place of this tile's chunk among the background's partial sums.
  void backward(int64_t tile, int64_t item) {
    near_.find(tile, p_.query_mask);
    if (p_.background.active) find_empty_cells();
    for (int64_t head = 0; head < p_.heads; ++head) {
      load_columns(p_.q, head, near_.rows, columns_.get(), p_.scale);
      load_columns(p_.grad_out, head, near_.rows, value_columns_.get(), 1);
      load_statistics(head);
      columns_to_rows<Real>(columns_.get(), p_.q.width, query_rows_.get(), lane_width_);
      columns_to_rows<Real>(value_columns_.get(), p_.v.width, grad_rows_.get(), lane_value_width_);
      const bool finite = all_finite<Real>(columns_.get(), p_.q.width) &&
                          all_finite<Real>(value_columns_.get(), p_.v.width);
      fill(sums_.get(), p_.q.width);
      const B row_key = query_keys(head);
      for (int64_t begin = 0; begin < near_.count; begin += kBlock) {
        const int64_t count = std::min<int64_t>(kBlock, near_.count - begin);
        find_rows(p_.k, head, &near_.ids[begin], count, row_copies_.get(), rows_);
        find_rows(p_.v, head, &near_.ids[begin], count, value_row_copies_.get(), value_rows_);
        multiply(rows_, count, p_.q.width, columns_.get(), logits_.get());
        multiply(value_rows_, count, p_.v.width, value_columns_.get(), products_.get());
        for (int64_t u = 0; u < count; ++u)
          differentiate(near_.seers[begin + u], row_key ^ uint32_t(near_.ids[begin + u]), products_[u],
                        logits_[u], products_[u]);
        add_rows(logits_.get(), &near_.seers[begin], rows_, count, p_.q.width, sums_.get());
        add_outer(finite, logits_.get(), begin, count, query_rows_.get(), lane_width_, p_.grad_k,
                  head);
        add_outer(finite, products_.get(), begin, count, grad_rows_.get(), lane_value_width_,
                  p_.grad_v, head);
      }
      if (p_.background.active) backward_background(head, row_key, item);
      store_columns(sums_.get(), p_.scale, p_.grad_q, head, near_.rows);
    }
  }

 private:
  // Which lanes find each cell of their windows empty, and have a background there.
  void find_empty_cells() {
    const Background& b = p_.background;
    uint32_t backed = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t image = near_.rows[lane] < 0 ? -1 : b.query_batch[near_.rows[lane]];
      images_[lane] = image < b.images ? image : -1;
      if (images_[lane] >= 0) backed |= near_.present & 1u << lane;
    }
    std::fill_n(empty_.get(), b.slots, backed);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(backed >> lane & 1)) continue;
      int64_t at = near_.rows[lane] * slices_.slices, slot = 0;
      for (int64_t level = 0; level < b.levels; ++level) {
        const int64_t window = b.windows[level];
        const uint32_t center = b.center_columns[near_.rows[lane] * b.levels + level];
        for (int64_t row = 0; row < b.level_rows[level]; ++row, ++at, slot += window) {
          const int64_t stop = std::min<int64_t>(slices_.stops[at], slices_.points);
          for (int64_t place = std::max(slices_.starts[at], 0); place < stop; ++place) {
            // Columns are kept in 32 bits; how far apart two are comes out right all the same.
            const int64_t column = int32_t(b.point_columns[place] - center) + window / 2;
            if (column >= 0 && column < window) empty_[slot + column] &= ~(1u << lane);
          }
        }
      }
    }
  }

  // Empty cells are neighbors like others, but for this: lanes differ in the query (its rotation
  // holds where the window lies) and share the keys, and a level's cells all have one value.
  void attend_background(int64_t head, B row_key) {
    const Background& b = p_.background;
    for (int64_t level = 0, first = 0; level < b.levels; ++level) {
      load_level(level, head);
      const int64_t stop = first + b.level_rows[level] * b.windows[level];
      for (; first < stop; first += kBlock) {
        const int64_t count = load_cells(first, std::min<int64_t>(kBlock, stop - first), head);
        softmax_step(cell_seers_, count, [&](int64_t u) { return cell_key(row_key, first + u); });
        V mass{};
        for (int64_t u = 0; u < count; ++u) mass += logits_[u];
        for (int64_t c = 0; c < p_.v.width; ++c)
          value_sums_[c] += mass == 0 ? V{} : mass * cell_values_[c];
      }
      first = stop;
    }
  }

  void backward_background(int64_t head, B row_key, int64_t item) {
    const Background& b = p_.background;
    for (int64_t level = 0, first = 0; level < b.levels; ++level) {
      load_level(level, head);
      columns_to_rows<Real>(cell_columns_.get(), p_.q.width, cell_query_rows_.get(), lane_width_);
      fill(cell_sums_.get(), p_.q.width);
      V product{}, mass{};
      for (int64_t c = 0; c < p_.v.width; ++c) product += cell_values_[c] * value_columns_[c];
      const int64_t stop = first + b.level_rows[level] * b.windows[level];
      for (; first < stop; first += kBlock) {
        const int64_t real = std::min<int64_t>(kBlock, stop - first);
        const int64_t count = load_cells(first, real, head);
        for (int64_t u = 0; u < count; ++u) {
          V share;
          differentiate(cell_seers_[u], cell_key(row_key, first + u), product, logits_[u], share);
          mass += share;
        }
        add_rows(logits_.get(), cell_seers_, rows_, count, p_.q.width, cell_sums_.get());
        for (int64_t u = 0; u < real; ++u) add_key_gradient(item * b.slots + first + u, head, logits_[u]);
      }
      first = stop;
      store_columns(cell_sums_.get(), p_.scale, b.grad_query, head, level_ids_);
      add_value_gradient(item * b.images * b.levels + level, head, mass);
    }
  }

  // What the level's empty cells of every lane share: the query they see, and their value.
  void load_level(int64_t level, int64_t head) {
    const Background& b = p_.background;
    int64_t values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      level_ids_[lane] = near_.rows[lane] < 0 ? -1 : near_.rows[lane] * b.levels + level;
      values[lane] = images_[lane] < 0 ? -1 : images_[lane] * b.levels + level;
    }
    load_columns(b.query, head, level_ids_, cell_columns_.get(), p_.scale);
    load_columns(b.value, head, values, cell_values_.get(), 1);
  }

  // The logits of `count` cells of the windows; returns the padded count.
  int64_t load_cells(int64_t first, int64_t count, int64_t head) {
    int64_t slots[kBlock];
    for (int64_t u = 0; u < padded(count); ++u) {
      slots[u] = u < count ? first + u : 0;
      cell_seers_[u] = u < count ? empty_[first + u] : 0;
    }
    find_rows(p_.background.key, head, slots, padded(count), row_copies_.get(), rows_);
    multiply(rows_, padded(count), p_.q.width, cell_columns_.get(), logits_.get());
    return padded(count);
  }

  B cell_key(B row_key, int64_t slot) const { return row_key ^ uint32_t(slices_.points + slot); }

  void add_key_gradient(int64_t row, int64_t head, V grad) {
    Real* out = static_cast<Real*>(p_.background.grad_key_parts) + (row * p_.heads + head) * p_.q.width;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (grad[lane] == 0) continue;
      const Real* query = &cell_query_rows_[lane * lane_width_];
      for (int64_t c = 0; c < p_.q.width; ++c) out[c] += grad[lane] * query[c];
    }
  }

  void add_value_gradient(int64_t first_row, int64_t head, V mass) {
    const Background& b = p_.background;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (images_[lane] < 0 || mass[lane] == 0) continue;
      const int64_t row = first_row + images_[lane] * b.levels;
      Real* out = static_cast<Real*>(b.grad_value_parts) + (row * p_.heads + head) * p_.v.width;
      for (int64_t c = 0; c < p_.v.width; ++c) out[c] += mass[lane] * value_columns_[c][lane];
    }
  }

  // Turns logits_ into weights, and brings what was summed before down to the new maximum.
  template <typename Key>
  void softmax_step(const uint32_t* seers, int64_t count, const Key& key) {
    const V lowest = V{} - std::numeric_limits<Real>::infinity();
    V top = top_;
    for (int64_t u = 0; u < count; ++u) {
      logits_[u] = lane_mask<Real>(seers[u]) ? logits_[u] : lowest;
      top = logits_[u] > top ? logits_[u] : top;
    }
    const V base = top == lowest ? V{} : top;
    const V shrink = exponential<Real>(top_ - base);
    total_ *= shrink;
    for (int64_t c = 0; c < p_.v.width; ++c) value_sums_[c] *= shrink;
    for (int64_t u = 0; u < count; ++u) {
      const V share = exponential<Real>(logits_[u] - base);
      total_ += share;
      logits_[u] = p_.dropout.active ? share * kept_weight<Real>(p_.dropout, key(u)) : share;
    }
    top_ = top;
  }

  // From a pair's logit and the product of its value with the output's gradient: the gradient of
  // the logit, in place of it, and the weight by which the value entered the output.
  void differentiate(uint32_t seers, B key, V product, V& logit, V& weight) const {
    const V probability = exponential<Real>(logit - top_);
    const V kept =
        p_.dropout.active ? kept_weight<Real>(p_.dropout, key) : V{} + Real(1);
    const auto seen = lane_mask<Real>(seers);
    logit = seen ? probability * (kept * product - delta_) : V{};
    weight = seen ? probability * kept : V{};
  }

  void add_rows(const V* weights, const uint32_t* seers, const Real* const* rows, int64_t count,
                int64_t width, V* out) {
    std::copy_n(out, width, before_.get());
    accumulate(weights, rows, count, width, out);
    if (all_finite<Real>(out, width)) return;
    std::copy_n(before_.get(), width, out);
    accumulate_seen(weights, seers, rows, count, width, out);
  }

  // Adds weights[u] x rows, the lanes' rows, to the gradient of each neighbor that is seen.
  void add_outer(bool finite, const V* weights, int64_t begin, int64_t count, const Real* rows,
                 int64_t stride, const Rows& grad, int64_t head) {
    Real* targets[kUnroll];
    for (int64_t u = 0; u < count; u += kUnroll) {
      for (int j = 0; j < kUnroll; ++j) {
        targets[j] = row_of<Real>(grad, near_.ids[begin + u + j], head);
        prefetch(targets[j], grad.width);
      }
      for (int64_t c = 0; c < stride; c += kLanes) {
        V sums[kUnroll];
        if (finite) outer<true, Real>(weights + u, rows + c, stride, sums);
        else outer<false, Real>(weights + u, rows + c, stride, sums);
        const int64_t width = std::min<int64_t>(kLanes, grad.width - c);
        for (int j = 0; j < kUnroll; ++j)  // a row that no lane sees may be another thread's
          if (near_.seers[begin + u + j]) add_to<Real>(targets[j] + c, sums[j], width);
      }
    }
  }

  void finish(int64_t head) {
    const V inverse = total_ == 0 ? V{} : Real(1) / total_;
    for (int64_t c = 0; c < p_.v.width; ++c) value_sums_[c] *= inverse;
    store_columns(value_sums_.get(), 1, p_.out, head, near_.rows);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (near_.rows[lane] < 0) continue;
      static_cast<Real*>(p_.lse)[near_.rows[lane] * p_.heads + head] = top_[lane] + std::log(total_[lane]);
    }
  }

  // The log-sum-exp, into top_, and delta = out . grad_out - grad_lse.
  void load_statistics(int64_t head) {
    load_columns(p_.out, head, near_.rows, value_sums_.get(), 1);
    delta_ = V{};
    for (int64_t c = 0; c < p_.v.width; ++c) delta_ += value_sums_[c] * value_columns_[c];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t at = near_.rows[lane] * p_.heads + head;
      top_[lane] = 0;
      if (near_.rows[lane] < 0) continue;
      const Real lse = static_cast<const Real*>(p_.lse)[at];
      if (lse != -std::numeric_limits<Real>::infinity()) top_[lane] = lse;
      delta_[lane] -= static_cast<const Real*>(p_.grad_lse)[at];
    }
  }

  B lane_ids() const {
    B ids;
    for (int lane = 0; lane < kLanes; ++lane) ids[lane] = uint32_t(near_.rows[lane]);
    return ids;
  }

  // Dropout's key of (head, query), to be combined with a column's number.
  B query_keys(int64_t head) const {
    return p_.dropout.active ? mix(lane_ids() ^ mix(p_.dropout.key ^ uint32_t(head))) : B{};
  }

  static void fill(V* columns, int64_t count) { std::fill_n(columns, count, V{}); }

  // A row per lane, channels across: columns[c][lane]. Lanes without a row hold zero.
  void load_columns(const Rows& rows, int64_t head, const int64_t* ids, V* columns, double scale) {
    int64_t c = 0;
    for (; c + kLanes <= rows.width; c += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane)
        columns[c + lane] = ids[lane] < 0 ? V{} : load_as_sums(row_of<T>(rows, ids[lane], head) + c);
      transpose<Real>(columns + c);
      for (int lane = 0; lane < kLanes; ++lane) columns[c + lane] *= Real(scale);
    }
    for (; c < rows.width; ++c)
      for (int lane = 0; lane < kLanes; ++lane)
        columns[c][lane] =
            ids[lane] < 0 ? Real(0) : Real(row_of<T>(rows, ids[lane], head)[c]) * Real(scale);
  }

  // The way back.
  void store_columns(const V* columns, double scale, const Rows& rows, int64_t head,
                     const int64_t* ids) {
    int64_t c = 0;
    for (; c + kLanes <= rows.width; c += kLanes) {
      V block[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) block[lane] = columns[c + lane] * Real(scale);
      transpose<Real>(block);
      for (int lane = 0; lane < kLanes; ++lane)
        if (ids[lane] >= 0) store<T, Real>(row_of<T>(rows, ids[lane], head) + c, block[lane]);
    }
    for (; c < rows.width; ++c)
      for (int lane = 0; lane < kLanes; ++lane)
        if (ids[lane] >= 0) row_of<T>(rows, ids[lane], head)[c] = T(columns[c][lane] * Real(scale));
  }

  // Where the rows stand, or copies of them in the type of the sums.
  template <typename Id>
  void find_rows(const Rows& rows, int64_t head, const Id* ids, int64_t count, Real* copies,
                 const Real** found) {
    for (int64_t u = 0; u < count; ++u) {
      const T* row = row_of<T>(rows, ids[u], head);
      if constexpr (std::is_same_v<T, Real>) {
        found[u] = row;
      } else {
        found[u] = copies + u * rows.width;
        for (int64_t c = 0; c < rows.width; ++c) copies[u * rows.width + c] = Real(row[c]);
      }
    }
  }

  const Problem& p_;
  const Slices& slices_;
  const int64_t lane_width_, lane_value_width_;  // padded to kLanes
  Neighbors<kLanes> near_;
  const Real *rows_[kBlock], *value_rows_[kBlock];
  Buffer<Real> row_copies_, value_row_copies_;
  Buffer<V> logits_, products_, columns_, value_columns_, sums_, value_sums_, before_;
  Buffer<Real> query_rows_, grad_rows_;
  V top_, total_, delta_;
  // The background's part.
  int64_t images_[kLanes], level_ids_[kLanes];
  uint32_t cell_seers_[kBlock];
  Buffer<uint32_t> empty_;
  Buffer<Real> cell_query_rows_;
  Buffer<V> cell_columns_, cell_values_, cell_sums_;
};

template <typename T>
void run_forward(const Problem& problem, Work& work) {
  Tile<T> tiles(problem);
  for (int64_t item = work.take(); item < work.items(); item = work.take()) tiles.forward(item);
}

template <typename T>
void run_backward(const Problem& problem, Schedule& schedule) {
  Tile<T> tiles(problem);
  for (int64_t turn = schedule.take(); turn < schedule.chunks; turn = schedule.take()) {
    const int64_t chunk = schedule.chunk_at(turn);
    const Schedule::Turn under_way(schedule, turn);
    const int64_t stop = std::min((chunk + 1) * schedule.tiles_per_chunk, schedule.tiles);
    for (int64_t tile = chunk * schedule.tiles_per_chunk; tile < stop; ++tile)
      tiles.backward(tile, chunk);
  }
}

// The number of queries in a tile.
inline int64_t tile_queries(Storage storage) {
  return storage == Storage::float64 ? n_lanes<double> : n_lanes<float>;
}

// One thread's share of the work.
inline void attend(Storage storage, const Problem& problem, Work& work) {
  with_storage(storage, [&](auto type) { run_forward<decltype(type)>(problem, work); });
}

inline void attend_backward(Storage storage, const Problem& problem, Schedule& schedule) {
  with_storage(storage, [&](auto type) { run_backward<decltype(type)>(problem, schedule); });
}

}  // namespace vicinal::VICINAL_ISA
