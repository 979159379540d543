// The empty cells in the windows of a tile of queries, which attention with a background treats as
// additional keys. See kernels.h for how it is included.

namespace vicinal::VICINAL_ISA {

// For each query and level of a tile, the list of its window's empty cells. Slot 1 + c is cell c of
// the K cells of all windows; slot 0 is padding.
class EmptyCells {
 public:
  EmptyCells(const NeighborSlices& slices, const WindowParams& windows,
             const BackgroundParams& background, int64_t tile_queries)
      : slices_(slices),
        windows_(windows),
        background_(background),
        tile_queries_(tile_queries) {
    if (!background.active) return;
    list_begins_.resize(tile_queries * windows.n_levels);
    list_counts_.resize(tile_queries * windows.n_levels);
    slots_.resize(tile_queries * (windows.n_cells + windows.n_levels * kListPadding));
    occupied_.resize(windows.n_cells);
  }

  void load(const TileNeighbors& neighbors) {
    int64_t end = 0;
    for (int i = 0; i < tile_queries_; ++i) {
      const int64_t query = neighbors.query_ids[i];
      const int64_t image = query < 0 ? -1 : background_.query_batch[query];
      image_ids[i] = image < background_.n_images ? image : -1;
      const bool valid = neighbors.query_valid[i] && image_ids[i] >= 0;
      if (valid) mark_occupied(query);
      end = write_lists(i, valid, end);
    }
  }

  SlotList list(int i, int64_t level) const {
    const int64_t index = i * windows_.n_levels + level;
    return {&slots_[list_begins_[index]], list_counts_[index]};
  }

  int64_t image_ids[kMaxTile];  // [tile_queries], -1 if the query has no valid image

 private:
  // Writes the lists of query i from slots_[end] on. Returns their end.
  VICINAL_INLINE int64_t write_lists(int i, bool valid, int64_t end) {
    int64_t cell = 0, row = 0;
    for (int64_t level = 0; level < windows_.n_levels; ++level) {
      int64_t last = cell;
      for (const int64_t end_row = row + windows_.level_rows[level]; row < end_row; ++row)
        last += windows_.rows[row].width;
      const int64_t index = i * windows_.n_levels + level;
      list_begins_[index] = end;
      for (; valid && cell < last; ++cell)
        if (!occupied_[cell]) slots_[end++] = int32_t(1 + cell);
      cell = last;
      list_counts_[index] = end - list_begins_[index];
      for (; end % kListPadding; ++end) slots_[end] = 0;
    }
    return end;
  }

  void mark_occupied(int64_t query) {
    std::fill(occupied_.begin(), occupied_.end(), 0);
    for_window_rows(windows_, query, [&](int64_t row, uint32_t column, int64_t width, int64_t cell) {
      mark_row(query * slices_.n_slices + row, column, width, cell);
    });
  }

  // Marks the cells of one window row, from `first_column` on, that hold a point of its slice.
  VICINAL_INLINE void mark_row(int64_t slice, uint32_t first_column, int64_t width,
                               int64_t first_cell) {
    for (int64_t i = slices_.start(slice), stop = slices_.stop(slice); i < stop; ++i) {
      // Columns are stored modulo 2^32, and so is their difference, which is small.
      const int64_t column = int32_t(windows_.point_columns[i] - first_column);
      if (column >= 0 && column < width) occupied_[first_cell + column] = 1;
    }
  }

  const NeighborSlices& slices_;
  const WindowParams& windows_;
  const BackgroundParams& background_;
  const int64_t tile_queries_;
  std::vector<int64_t> list_begins_, list_counts_;  // [tile_queries, L], of each list in slots_
  std::vector<int32_t> slots_;                      // all slot lists, one after the other
  std::vector<uint8_t> occupied_;                   // [K], cells of the current query with a point
};

}  // namespace vicinal::VICINAL_ISA
