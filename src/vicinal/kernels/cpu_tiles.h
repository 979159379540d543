// Attention, for one instruction set: see cpu_vectors.h.
//
// A tile is as many rows as a vector has lanes: queries (forward, and backward to the queries) or
// points (backward to keys and values). Rows of a tile are neighbors in space and so share most of
// their neighbors. The tile walks the union of these, one neighbor at a time broadcast against all
// lanes, with a bit per lane for who sees it. So sums run down the lanes, never across, the inner
// loops are those of a matrix product, and a tile is one thread's alone: no atomics, and the same
// bits for any number of threads.

namespace vicinal::VICINAL_ISA {

constexpr int kUnroll = 8;    // rows or channels that the inner loops keep in registers
constexpr int kBlock = 128;   // neighbors whose logits are held at a time; a multiple of kUnroll

inline int64_t padded(int64_t count) { return (count + kUnroll - 1) / kUnroll * kUnroll; }

template <typename Real>
inline Vector<Real> kept_weight(const Dropout& dropout, Bits<Real> key) {
  return mix(key) >= dropout.threshold ? Vector<Real>{} + Real(dropout.keep_scale) : Vector<Real>{};
}

// All ones in the lanes whose bit is set.
template <typename Real>
inline auto lane_mask(uint32_t lanes) {
  Bits<Real> bit;
  for (int lane = 0; lane < n_lanes<Real>; ++lane) bit[lane] = 1u << lane;
  return (bit & lanes) != 0;
}

// out[u] = sum over c of rows[u][c] * columns[c]; count is padded.
template <typename Real>
inline void multiply(const Real* rows, int64_t count, int64_t stride, int64_t width,
                     const Vector<Real>* columns, Vector<Real>* out) {
  for (int64_t u = 0; u < count; u += kUnroll) {
    Vector<Real> sums[kUnroll] = {};
    const Real* row = rows + u * stride;
    for (int64_t c = 0; c < width; ++c) {
      const Vector<Real> column = columns[c];
#pragma GCC unroll 8
      for (int j = 0; j < kUnroll; ++j) sums[j] += row[j * stride + c] * column;
    }
#pragma GCC unroll 8
    for (int j = 0; j < kUnroll; ++j) out[u + j] = sums[j];
  }
}

// out[c] += sum over u of weights[u] * rows[u][c]; stride is the padded width.
template <typename Real>
inline void accumulate(const Vector<Real>* weights, const Real* rows, int64_t count, int64_t stride,
                       Vector<Real>* out) {
  for (int64_t c = 0; c < stride; c += kUnroll) {
    Vector<Real> sums[kUnroll];
#pragma GCC unroll 8
    for (int j = 0; j < kUnroll; ++j) sums[j] = out[c + j];
    for (int64_t u = 0; u < count; ++u) {
      const Vector<Real> weight = weights[u];
      const Real* row = rows + u * stride + c;
#pragma GCC unroll 8
      for (int j = 0; j < kUnroll; ++j) sums[j] += row[j] * weight;
    }
#pragma GCC unroll 8
    for (int j = 0; j < kUnroll; ++j) out[c + j] = sums[j];
  }
}

template <typename T>
class Tile {
  using Real = typename SumType<T>::type;
  using V = Vector<Real>;
  using B = Bits<Real>;
  static constexpr int kLanes = n_lanes<Real>;

 public:
  Tile(const Problem& problem, const Slices& slices)
      : p_(problem),
        slices_(slices),
        width_(padded(problem.q.width)),
        value_width_(padded(problem.v.width)),
        intervals_(kLanes * slices.slices),
        rows_(kBlock * width_),
        value_rows_(kBlock * value_width_),
        logits_(kBlock),
        products_(kBlock),
        columns_(width_),
        value_columns_(value_width_),
        sums_(width_),
        value_sums_(value_width_),
        empty_(problem.background.slots),
        query_rows_(kLanes * width_),
        cell_columns_(width_),
        cell_values_(value_width_),
        cell_sums_(width_) {}

  void forward(int64_t tile) {
    find_neighbors(tile, p_.query_mask, nullptr);
    if (p_.background.active) find_empty_cells();
    for (int64_t head = 0; head < p_.heads; ++head) {
      load_columns(p_.q, head, ids_, columns_.get(), p_.scale);
      fill(value_sums_.get(), value_width_);
      top_ = V{} - std::numeric_limits<Real>::infinity();
      total_ = V{};
      const B row_key = query_keys(head);
      for (int64_t begin = 0; begin < count_; begin += kBlock) {
        const int64_t count = std::min<int64_t>(kBlock, count_ - begin);
        load_rows(p_.k, head, &neighbors_[begin], count, rows_.get(), width_);
        multiply(rows_.get(), count, width_, p_.q.width, columns_.get(), logits_.get());
        softmax_step(&seers_[begin], count, [&](int64_t u) {
          return row_key ^ uint32_t(neighbors_[begin + u]);
        });
        load_rows(p_.v, head, &neighbors_[begin], count, value_rows_.get(), value_width_);
        accumulate(logits_.get(), value_rows_.get(), count, value_width_, value_sums_.get());
      }
      if (p_.background.active) attend_background(head, row_key);
      finish(head);
    }
  }

  // Gradient of the queries (and of the background), and delta, which the other pass needs.
  void backward_queries(int64_t tile, int64_t item) {
    find_neighbors(tile, p_.query_mask, nullptr);
    if (p_.background.active) find_empty_cells();
    for (int64_t head = 0; head < p_.heads; ++head) {
      load_columns(p_.q, head, ids_, columns_.get(), p_.scale);
      load_columns(p_.grad_out, head, ids_, value_columns_.get(), 1);
      load_statistics(head);
      fill(sums_.get(), width_);
      const B row_key = query_keys(head);
      for (int64_t begin = 0; begin < count_; begin += kBlock) {
        const int64_t count = std::min<int64_t>(kBlock, count_ - begin);
        load_rows(p_.k, head, &neighbors_[begin], count, rows_.get(), width_);
        load_rows(p_.v, head, &neighbors_[begin], count, value_rows_.get(), value_width_);
        multiply(rows_.get(), count, width_, p_.q.width, columns_.get(), logits_.get());
        multiply(value_rows_.get(), count, value_width_, p_.v.width, value_columns_.get(),
                 products_.get());
        for (int64_t u = 0; u < count; ++u) {
          V product = products_[u];
          if (p_.dropout.active)
            product *= kept_weight<Real>(p_.dropout, row_key ^ uint32_t(neighbors_[begin + u]));
          logits_[u] = weight(logits_[u] - top_, seers_[begin + u]) * (product - delta_);
        }
        accumulate(logits_.get(), rows_.get(), count, width_, sums_.get());
      }
      if (p_.background.active) backward_background(head, row_key, item);
      store_columns(sums_.get(), p_.scale, p_.grad_q, head, ids_);
    }
  }

  // Gradient of keys and values: the lanes are points, their neighbors the queries that see them.
  void backward_points(int64_t tile) {
    find_neighbors(tile, nullptr, p_.query_mask);
    const Real* lse = static_cast<const Real*>(p_.lse);
    const Real* delta = static_cast<const Real*>(p_.delta);
    for (int64_t head = 0; head < p_.heads; ++head) {
      load_columns(p_.k, head, ids_, columns_.get(), p_.scale);
      load_columns(p_.v, head, ids_, value_columns_.get(), 1);
      fill(sums_.get(), width_);
      fill(value_sums_.get(), value_width_);
      const uint32_t head_key = mix(p_.dropout.key ^ uint32_t(head));
      for (int64_t begin = 0; begin < count_; begin += kBlock) {
        const int64_t count = std::min<int64_t>(kBlock, count_ - begin);
        const int32_t* queries = &neighbors_[begin];
        load_rows(p_.q, head, queries, count, rows_.get(), width_);
        load_rows(p_.grad_out, head, queries, count, value_rows_.get(), value_width_);
        multiply(rows_.get(), count, width_, p_.q.width, columns_.get(), logits_.get());
        multiply(value_rows_.get(), count, value_width_, p_.v.width, value_columns_.get(),
                 products_.get());
        for (int64_t u = 0; u < count; ++u) {
          const int64_t at = queries[u] * p_.heads + head;
          V kept = V{} + Real(1);
          if (p_.dropout.active)
            kept = kept_weight<Real>(p_.dropout, lane_ids() ^ mix(head_key ^ uint32_t(queries[u])));
          const V probability = weight(logits_[u] - lse[at], seers_[begin + u]);
          logits_[u] = probability * (kept * products_[u] - delta[at]);
          products_[u] = probability * kept;
        }
        accumulate(logits_.get(), rows_.get(), count, width_, sums_.get());
        accumulate(products_.get(), value_rows_.get(), count, value_width_, value_sums_.get());
      }
      store_columns(sums_.get(), p_.scale, p_.grad_k, head, ids_);
      store_columns(value_sums_.get(), 1, p_.grad_v, head, ids_);
    }
  }

 private:
  struct Interval {
    int64_t start, stop;
    uint32_t lanes;
    bool operator<(const Interval& other) const { return start < other.start; }
  };

  // The tile's rows, and the union of what they see with a bit for each lane that sees it.
  void find_neighbors(int64_t tile, const bool* row_mask, const bool* neighbor_mask) {
    present_ = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t place = tile * kLanes + lane;
      const int64_t row = place < slices_.rows ? slices_.visits[place] : -1;
      ids_[lane] = row >= 0 && row < slices_.rows ? row : -1;
      if (ids_[lane] >= 0 && !(row_mask && row_mask[row])) present_ |= 1u << lane;
    }
    merge(collect_intervals());
    for (int64_t u = 0; u < count_; ++u) {
      const int64_t id = neighbors_[u];
      if (id >= 0 && id < slices_.targets && !(neighbor_mask && neighbor_mask[id])) continue;
      neighbors_[u] = 0;
      seers_[u] = 0;
    }
    for (; count_ % kUnroll; ++count_) neighbors_[count_] = 0, seers_[count_] = 0;
  }

  // Rows that fall into one cell of a level have equal slices there: those are listed once.
  int64_t collect_intervals() {
    int64_t count = 0, size = 0;
    for (int64_t slice = 0; slice < slices_.slices; ++slice) {
      const int64_t first = count;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (!(present_ >> lane & 1)) continue;
        const int64_t at = ids_[lane] * slices_.slices + slice;
        const int64_t start = std::max<int64_t>(slices_.starts[at], 0);
        const int64_t stop = std::min<int64_t>(slices_.stops[at], slices_.length);
        if (start >= stop) continue;
        Interval* last = count > first ? &intervals_[count - 1] : nullptr;
        if (last && last->start == start && last->stop == stop) {
          last->lanes |= 1u << lane;
        } else {
          intervals_[count++] = {start, stop, 1u << lane};
          size += stop - start;
        }
      }
    }
    neighbors_.reserve(size + kUnroll);
    seers_.reserve(size + kUnroll);
    return count;
  }

  void merge(int64_t n_intervals) {
    std::sort(intervals_.get(), intervals_.get() + n_intervals);
    count_ = 0;
    int64_t listed = -1;  // what has been listed ends before this place in the order
    for (int64_t index = 0; index < n_intervals; ++index) {
      const Interval& interval = intervals_[index];
      listed = std::max(listed, interval.start);
      for (; listed < interval.stop; ++listed, ++count_) {
        neighbors_[count_] = slices_.order[listed];
        seers_[count_] = 0;
      }
      const int64_t shift = count_ - listed;
      for (int64_t place = interval.start; place < interval.stop; ++place)
        seers_[place + shift] |= interval.lanes;
    }
  }

  // Which lanes find each cell of their windows empty, and have a background there.
  void find_empty_cells() {
    const Background& b = p_.background;
    uint32_t backed = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t image = ids_[lane] < 0 ? -1 : b.query_batch[ids_[lane]];
      images_[lane] = image < b.images ? image : -1;
      if (images_[lane] >= 0) backed |= present_ & 1u << lane;
    }
    std::fill_n(empty_.get(), b.slots, backed);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(backed >> lane & 1)) continue;
      int64_t at = ids_[lane] * slices_.slices, slot = 0;
      for (int64_t level = 0; level < b.levels; ++level) {
        const int64_t window = b.windows[level];
        const int64_t left = b.center_columns[ids_[lane] * b.levels + level] - window / 2;
        for (int64_t row = 0; row < b.level_rows[level]; ++row, ++at, slot += window) {
          const int64_t stop = std::min<int64_t>(slices_.stops[at], slices_.length);
          for (int64_t place = std::max(slices_.starts[at], 0); place < stop; ++place) {
            const int64_t column = b.point_columns[place] - left;
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
        for (int64_t c = 0; c < p_.v.width; ++c) value_sums_[c] += mass * cell_values_[c];
      }
      first = stop;
    }
  }

  void backward_background(int64_t head, B row_key, int64_t item) {
    const Background& b = p_.background;
    for (int64_t level = 0, first = 0; level < b.levels; ++level) {
      load_level(level, head);
      load_rows(b.query, head, level_ids_, kLanes, query_rows_.get(), width_);
      fill(cell_sums_.get(), width_);
      V product{}, mass{};
      for (int64_t c = 0; c < p_.v.width; ++c) product += cell_values_[c] * value_columns_[c];
      const int64_t stop = first + b.level_rows[level] * b.windows[level];
      for (; first < stop; first += kBlock) {
        const int64_t real = std::min<int64_t>(kBlock, stop - first);
        const int64_t count = load_cells(first, real, head);
        for (int64_t u = 0; u < count; ++u) {
          V kept = V{} + Real(1);
          if (p_.dropout.active) kept = kept_weight<Real>(p_.dropout, cell_key(row_key, first + u));
          const V probability = weight(logits_[u] - top_, cell_seers_[u]);
          mass += probability * kept;
          logits_[u] = probability * (kept * product - delta_);
        }
        accumulate(logits_.get(), rows_.get(), count, width_, cell_sums_.get());
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
      level_ids_[lane] = ids_[lane] < 0 ? -1 : ids_[lane] * b.levels + level;
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
    load_rows(p_.background.key, head, slots, padded(count), rows_.get(), width_);
    multiply(rows_.get(), padded(count), width_, p_.q.width, cell_columns_.get(), logits_.get());
    return padded(count);
  }

  B cell_key(B row_key, int64_t slot) const { return row_key ^ uint32_t(slices_.targets + slot); }

  void add_key_gradient(int64_t row, int64_t head, V grad) {
    Real* out = static_cast<Real*>(p_.background.grad_key_parts) + (row * p_.heads + head) * p_.q.width;
    for (int lane = 0; lane < kLanes; ++lane) {
      const Real factor = grad[lane] * Real(p_.scale);
      const Real* query = &query_rows_[lane * width_];
      for (int64_t c = 0; c < p_.q.width; ++c) out[c] += factor * query[c];
    }
  }

  void add_value_gradient(int64_t first_row, int64_t head, V mass) {
    const Background& b = p_.background;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (images_[lane] < 0) continue;
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
    for (int64_t c = 0; c < value_width_; ++c) value_sums_[c] *= shrink;
    for (int64_t u = 0; u < count; ++u) {
      const V share = logits_[u] == lowest ? V{} : exponential<Real>(logits_[u] - base);
      total_ += share;
      logits_[u] = p_.dropout.active ? share * kept_weight<Real>(p_.dropout, key(u)) : share;
    }
    top_ = top;
  }

  V weight(V logit, uint32_t seers) const {
    return lane_mask<Real>(seers) ? exponential<Real>(logit) : V{};
  }

  void finish(int64_t head) {
    const V inverse = total_ == 0 ? V{} : Real(1) / total_;
    for (int64_t c = 0; c < p_.v.width; ++c) value_sums_[c] *= inverse;
    store_columns(value_sums_.get(), 1, p_.out, head, ids_);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (ids_[lane] < 0) continue;
      static_cast<Real*>(p_.lse)[ids_[lane] * p_.heads + head] = top_[lane] + std::log(total_[lane]);
    }
  }

  // The log-sum-exp, into top_, and delta = out . grad_out - grad_lse, which it also stores.
  void load_statistics(int64_t head) {
    load_columns(p_.out, head, ids_, value_sums_.get(), 1);
    delta_ = V{};
    for (int64_t c = 0; c < p_.v.width; ++c) delta_ += value_sums_[c] * value_columns_[c];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t at = ids_[lane] * p_.heads + head;
      top_[lane] = ids_[lane] < 0 ? 0 : static_cast<const Real*>(p_.lse)[at];
      if (ids_[lane] < 0) continue;
      delta_[lane] -= static_cast<const Real*>(p_.grad_lse)[at];
      static_cast<Real*>(p_.delta)[at] = delta_[lane];
    }
  }

  B lane_ids() const {
    B ids;
    for (int lane = 0; lane < kLanes; ++lane) ids[lane] = uint32_t(ids_[lane]);
    return ids;
  }

  // Dropout's key of (head, query), to be combined with a column's number.
  B query_keys(int64_t head) const {
    return p_.dropout.active ? mix(lane_ids() ^ mix(p_.dropout.key ^ uint32_t(head))) : B{};
  }

  static void fill(V* columns, int64_t count) { std::fill_n(columns, count, V{}); }

  // A row per lane, channels across: columns[c][lane]. Lanes without a row hold zero.
  void load_columns(const Rows& rows, int64_t head, const int64_t* ids, V* columns, double scale) {
    Real* out = reinterpret_cast<Real*>(columns);
    for (int lane = 0; lane < kLanes; ++lane, ++out) {
      const T* row = row_of<T>(rows, std::max<int64_t>(ids[lane], 0), head);
      for (int64_t c = 0; c < rows.width; ++c)
        out[c * kLanes] = ids[lane] < 0 ? Real(0) : Real(row[c]) * Real(scale);
    }
  }

  void store_columns(const V* columns, double scale, const Rows& rows, int64_t head,
                     const int64_t* ids) {
    const Real* in = reinterpret_cast<const Real*>(columns);
    for (int lane = 0; lane < kLanes; ++lane, ++in) {
      T* row = row_of<T>(rows, std::max<int64_t>(ids[lane], 0), head);
      for (int64_t c = 0; c < rows.width && ids[lane] >= 0; ++c)
        row[c] = T(in[c * kLanes] * Real(scale));
    }
  }

  // One row after another, in the type of the sums, with zeros up to the stride.
  template <typename Id>
  void load_rows(const Rows& rows, int64_t head, const Id* ids, int64_t count, Real* out,
                 int64_t stride) {
    for (int64_t u = 0; u < count; ++u, out += stride) {
      const T* row = row_of<T>(rows, std::max<int64_t>(ids[u], 0), head);
      for (int64_t c = 0; c < rows.width; ++c) out[c] = ids[u] < 0 ? Real(0) : Real(row[c]);
      for (int64_t c = rows.width; c < stride; ++c) out[c] = 0;
    }
  }

  const Problem& p_;
  const Slices& slices_;
  const int64_t width_, value_width_;  // padded
  int64_t ids_[kLanes];                // the tile's rows, -1 where it has fewer
  uint32_t present_ = 0;               // a bit per lane whose row takes part
  Buffer<Interval> intervals_;
  int64_t count_ = 0;
  Buffer<int32_t> neighbors_;
  Buffer<uint32_t> seers_;
  Buffer<Real> rows_, value_rows_;
  Buffer<V> logits_, products_, columns_, value_columns_, sums_, value_sums_;
  V top_, total_, delta_;
  // The background's part.
  int64_t images_[kLanes], level_ids_[kLanes];
  uint32_t cell_seers_[kBlock];
  Buffer<uint32_t> empty_;
  Buffer<Real> query_rows_;
  Buffer<V> cell_columns_, cell_values_, cell_sums_;
};

template <typename T>
void run_tiles(Pass pass, const Problem& problem, Work& work) {
  Tile<T> tiles(problem, pass == Pass::backward_points ? problem.points : problem.queries);
  for (int64_t item = work.take(); item < work.items(); item = work.take()) {
    const int64_t first = item * work.tiles_per_item;
    const int64_t stop = std::min(first + work.tiles_per_item, work.tiles);
    for (int64_t tile = first; tile < stop; ++tile) {
      if (pass == Pass::forward) tiles.forward(tile);
      if (pass == Pass::backward_queries) tiles.backward_queries(tile, item);
      if (pass == Pass::backward_points) tiles.backward_points(tile);
    }
  }
}

// The number of rows in a tile.
inline int64_t tile_rows(Storage storage) {
  return storage == Storage::float64 ? n_lanes<double> : n_lanes<float>;
}

// One thread's share of the work.
inline void run(Pass pass, Storage storage, const Problem& problem, Work& work) {
  with_storage(storage, [&](auto type) { run_tiles<decltype(type)>(pass, problem, work); });
}

}  // namespace vicinal::VICINAL_ISA
