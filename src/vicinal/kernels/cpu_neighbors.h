// What a tile of queries sees, for one instruction set: see cpu_vectors.h.

namespace vicinal::VICINAL_ISA {

// The rows of a tile of kLanes queries, and the union of the points they see. Slices, orders and
// visits may hold anything: nothing but valid rows and ids comes out.
template <int kLanes>
class Neighbors {
 public:
  explicit Neighbors(const Slices& slices)
      : slices_(slices),
        intervals_(kLanes * slices.slices + 1),
        latest_(slices.slices),
        order_(kLanes * slices.slices) {}

  // Finds the tile's rows and the union of what they see.
  void find(int64_t tile, const bool* mask) {
    present = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t place = tile * kLanes + lane;
      const int64_t row = place < slices_.rows ? slices_.visits[place] : -1;
      rows[lane] = row >= 0 && row < slices_.rows ? row : -1;
      if (rows[lane] >= 0 && !(mask && mask[row])) present |= 1u << lane;
    }
    merge(collect());
    for (int64_t u = 0; u < count; ++u) {
      if (ids[u] >= 0 && ids[u] < slices_.points) continue;
      ids[u] = 0;
      seers[u] = 0;
    }
    for (; count % kUnroll; ++count) ids[count] = 0, seers[count] = 0;
  }

  int64_t rows[kLanes];    // the tile's queries, -1 where it has fewer
  uint32_t present = 0;    // a bit per lane whose query takes part
  int64_t count = 0;       // of the union, padded to kUnroll with points that nobody sees
  Buffer<int32_t> ids;     // the union's points
  Buffer<uint32_t> seers;  // a bit per lane that sees the point

 private:
  struct Interval {
    int64_t start, stop;
    uint32_t lanes;
  };

  // Rows that fall into one cell of a level have equal slices there: those are listed once.
  int64_t collect() {
    int64_t found = 0, size = 0;
    std::fill_n(latest_.get(), slices_.slices, 0);
    intervals_[0] = {-1, -1, 0};
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(present >> lane & 1)) continue;
      const int32_t* starts = slices_.starts + rows[lane] * slices_.slices;
      const int32_t* stops = slices_.stops + rows[lane] * slices_.slices;
      for (int64_t slice = 0; slice < slices_.slices; ++slice) {
        const int64_t start = std::max(starts[slice], 0);
        const int64_t stop = std::min<int64_t>(stops[slice], slices_.points);
        if (start >= stop) continue;
        Interval& latest = intervals_[latest_[slice]];
        if (latest.start == start && latest.stop == stop) {
          latest.lanes |= 1u << lane;
        } else {
          order_[found] = start << 32 | (found + 1);
          intervals_[++found] = {start, stop, 1u << lane};
          latest_[slice] = found;
          size += stop - start;
        }
      }
    }
    size = std::min(size, slices_.points);
    ids.reserve(size + kUnroll);
    seers.reserve(size + kUnroll);
    return found;
  }

  void merge(int64_t n_intervals) {
    sort_numbers(order_.get(), n_intervals);
    count = 0;
    int64_t listed = -1;  // what has been listed ends before this place in the order
    for (int64_t index = 0; index < n_intervals; ++index) {
      const Interval& interval = intervals_[order_[index] & 0xFFFFFFFF];
      listed = std::max(listed, interval.start);
      for (; listed < interval.stop; ++listed, ++count) {
        ids[count] = slices_.order[listed];
        seers[count] = 0;
      }
      const int64_t shift = count - listed;
      for (int64_t place = interval.start; place < interval.stop; ++place)
        seers[place + shift] |= interval.lanes;
    }
  }

  const Slices& slices_;
  Buffer<Interval> intervals_;  // the first is a dummy
  Buffer<int32_t> latest_;      // each slice's last interval
  Buffer<uint64_t> order_;      // of the intervals: start in the high half, number in the low
};

}  // namespace vicinal::VICINAL_ISA
