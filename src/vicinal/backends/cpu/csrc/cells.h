// The empty cells in the windows of a tile of queries, for one instruction set: see vectors.h.

namespace vicinal::VICINAL_ISA {

// For each query and level of a tile, the cells of its window that hold no point but have a
// background. Slot 1 + c is cell c of the windows; slot 0 is none, and lists are filled up with it.
class EmptyCells {
 public:
  EmptyCells(const Slices& slices, const Background& background, int64_t tile_queries)
      : slices_(slices),
        b_(background),
        tile_queries_(tile_queries),
        first_(tile_queries * background.levels),
        counts_(tile_queries * background.levels),
        slots_(tile_queries * (background.slots + background.levels * kFill)),
        taken_(background.slots) {}

  void find(const Neighbors& near) {
    int64_t end = 0;
    for (int lane = 0; lane < tile_queries_; ++lane) {
      const int64_t row = near.rows[lane], image = row < 0 ? -1 : b_.query_batch[row];
      images[lane] = image < b_.images ? image : -1;
      const bool present = near.present[lane] && images[lane] >= 0;
      if (present) mark_taken(row);
      for (int64_t level = 0, cell = 0; level < b_.levels; ++level) {
        const int64_t stop = cell + b_.level_rows[level] * b_.windows[level];
        const int64_t at = lane * b_.levels + level;
        first_[at] = end;
        for (; present && cell < stop; ++cell)
          if (!taken_[cell]) slots_[end++] = int32_t(1 + cell);
        cell = stop;
        counts_[at] = end - first_[at];
        for (; end % kFill; ++end) slots_[end] = 0;
      }
    }
  }

  List list(int lane, int64_t level) const {
    const int64_t at = lane * b_.levels + level;
    return {&slots_[first_[at]], counts_[at]};
  }

  int64_t images[kMaxTile];  // of the tile's queries, -1 for none

 private:
  void mark_taken(int64_t row) {
    std::fill(taken_.begin(), taken_.end(), 0);
    int64_t at = row * slices_.slices, first = 0;
    for (int64_t level = 0; level < b_.levels; ++level) {
      const int64_t window = b_.windows[level];
      const uint32_t center = b_.center_columns[row * b_.levels + level];
      for (int64_t line = 0; line < b_.level_rows[level]; ++line, ++at, first += window)
        for (int64_t place = slices_.start(at), stop = slices_.stop(at); place < stop; ++place) {
          // Columns are kept in 32 bits; how far apart two are comes out right all the same.
          const int64_t column = int32_t(b_.point_columns[place] - center) + window / 2;
          if (column >= 0 && column < window) taken_[first + column] = 1;
        }
    }
  }

  const Slices& slices_;
  const Background& b_;
  const int64_t tile_queries_;
  std::vector<int64_t> first_, counts_;
  std::vector<int32_t> slots_;
  std::vector<uint8_t> taken_;
};

}  // namespace vicinal::VICINAL_ISA
