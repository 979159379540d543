// What a tile of queries sees.
#pragma once

#include "cpu_problem.h"

namespace vicinal {

constexpr int kMaxTile = 128;  // queries in a tile, at most

// Slots of what a query sees; filled up with slot 0.
struct List {
  const int32_t* slots;
  int64_t count;
};

// The queries of a tile, the points that any of them sees, numbered by slots, and for each query
// the slots of what it sees. Slices, orders and visits may hold anything: nothing but valid rows
// and points comes out. Slot 0 is nobody's: lists are filled up with it to a multiple of `step`.
class Neighbors {
 public:
  Neighbors(const Slices& slices, int64_t tile_queries, int64_t step)
      : slices_(slices), tile_queries_(tile_queries), step_(step), slot_of_(slices.points) {}

  void find(int64_t tile, const bool* mask) {
    const int64_t most = 1 + reserve_lists(tile, mask);
    points.reserve(most);
    places_.reserve(most);
    points[0] = places_[0] = -1;
    slot_count = 1;
    int64_t end = 0;
    for (int lane = 0; lane < tile_queries_; ++lane) {
      first_[lane] = end;
      if (present[lane]) end = add(rows[lane], end);
      counts_[lane] = end - first_[lane];
      for (; end % step_; ++end) slots_[end] = 0;
    }
  }

  List list(int lane) const { return {slots_.get() + first_[lane], counts_[lane]}; }

  int64_t rows[kMaxTile];   // the tile's queries, -1 where it has fewer
  bool present[kMaxTile];   // whether they take part
  Buffer<int32_t> points;   // of every slot
  int64_t slot_count = 1;

 private:
  // Finds the rows and makes room for their lists. Returns how many different points at most.
  int64_t reserve_lists(int64_t tile, const bool* mask) {
    int64_t total = 0;
    for (int lane = 0; lane < tile_queries_; ++lane) {
      const int64_t place = tile * tile_queries_ + lane;
      const int64_t row = place < slices_.rows ? slices_.visits[place] : -1;
      rows[lane] = row >= 0 && row < slices_.rows ? row : -1;
      present[lane] = rows[lane] >= 0 && !(mask && mask[row]);
      if (!present[lane]) continue;
      for (int64_t at = row * slices_.slices; at < (row + 1) * slices_.slices; ++at)
        total += std::max<int64_t>(slices_.stop(at) - slices_.start(at), 0);
    }
    slots_.reserve(total + tile_queries_ * step_);
    return std::min(total, slices_.points);
  }

  int64_t add(int64_t row, int64_t end) {
    for (int64_t at = row * slices_.slices; at < (row + 1) * slices_.slices; ++at)
      for (int64_t place = slices_.start(at), stop = slices_.stop(at); place < stop; ++place) {
        const int32_t slot = slot_at(place);
        slots_[end] = slot;
        end += slot > 0;
      }
    return end;
  }

  // The slot of the point at a place of the order, a new one if it has none yet; 0 if there is no
  // such point. What an earlier tile left in `slot_of_` does not lead back here.
  int32_t slot_at(int64_t place) {
    const int32_t slot = slot_of_[place];
    if (slot < slot_count && places_[slot] == place) return slot;
    const int32_t point = slices_.order[place];
    if (point < 0 || point >= slices_.points) return 0;
    points[slot_count] = point;
    places_[slot_count] = int32_t(place);
    slot_of_[place] = slot_count;
    return slot_count++;
  }

  const Slices& slices_;
  const int64_t tile_queries_, step_;
  int64_t first_[kMaxTile], counts_[kMaxTile];  // of each query among slots_
  Buffer<int32_t> slots_;
  Buffer<int32_t> places_;        // of every slot, in the order
  std::vector<int32_t> slot_of_;  // of every place
};

}  // namespace vicinal
