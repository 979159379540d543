// Which cells of their windows the points of a tile of queries lie in, for the learned bias. See
// kernels.h for how it is included.

namespace vicinal::VICINAL_ISA {

// For each query of a tile, the cells of its points, in the order of its slot list. Cell c of the K
// cells of all windows is 1 + c; 0 is padding.
class WindowCells {
 public:
  WindowCells(const NeighborSlices& slices, const WindowParams& windows, int64_t tile_queries)
      : slices_(slices), windows_(windows), tile_queries_(tile_queries) {}

  void load(const TileNeighbors& neighbors) {
    cells_.clear();
    for (int i = 0; i < tile_queries_; ++i) {
      list_begins_[i] = cells_.size();
      if (neighbors.query_valid[i]) append_cells(neighbors.query_ids[i]);
      cells_.resize((cells_.size() / kListPadding + 1) * kListPadding);
    }
  }

  const int32_t* list(int i) const { return cells_.data() + list_begins_[i]; }

 private:
  void append_cells(int64_t query) {
    for_window_rows(windows_, query, [&](int64_t row, uint32_t column, int64_t width, int64_t cell) {
      append_row(query * slices_.n_slices + row, column, width, 1 + cell);
    });
  }

  VICINAL_INLINE void append_row(int64_t slice, uint32_t first_column, int64_t width,
                                 int64_t first_cell) {
    for (int64_t i = slices_.start(slice), stop = slices_.stop(slice); i < stop; ++i) {
      if (slices_.order[i] < 0 || slices_.order[i] >= slices_.n_points) continue;
      const int64_t column = int32_t(windows_.point_columns[i] - first_column);
      cells_.push_back(column >= 0 && column < width ? int32_t(first_cell + column) : 0);
    }
  }

  const NeighborSlices& slices_;
  const WindowParams& windows_;
  const int64_t tile_queries_;
  int64_t list_begins_[kMaxTile];  // [tile_queries], of each list in cells_
  std::vector<int32_t> cells_;     // all lists, one after the other
};

}  // namespace vicinal::VICINAL_ISA
