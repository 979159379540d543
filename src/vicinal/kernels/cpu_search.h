// Where the rows of windows begin and end among sorted keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace vicinal {

struct RowSearch {
  const int64_t* keys;  // sorted
  int64_t n_keys;
  const int64_t* centers;  // [L, N]
  const int32_t* visits;   // [N]
  int64_t queries, rows, levels;
  const int64_t *level, *offset, *radius;  // [R]
  int32_t *starts, *stops;                 // [N, R]
};

// The first place whose key is not below `key`. Walks away from `hint` in doubling steps, so it
// takes the logarithm of how far off the hint is.
inline int64_t first_not_below(const int64_t* keys, int64_t n_keys, int64_t key, int64_t hint) {
  int64_t low = hint, high = hint, step = 1;
  if (hint < n_keys && keys[hint] < key) {
    for (; high < n_keys && keys[high] < key; high += step, step *= 2) low = high + 1;
    high = std::min(high, n_keys);
  } else {
    for (; low > 0 && keys[low - 1] >= key; low = std::max<int64_t>(low - step, 0), step *= 2)
      high = low - 1;
  }
  return std::lower_bound(keys + std::min(low, high), keys + high, key) - keys;
}

constexpr int64_t kAhead = 8;  // queries whose memory is asked for before it is needed

// Queries next to each other in `visits` are neighbors in space: each starts where the last ended, and
// on coarse levels most fall into the same cell.
inline void find_rows(const RowSearch& s, int64_t begin, int64_t end) {
  struct Row {
    int64_t middle, start = 0, stop = 0;
    bool found = false;
  };
  std::vector<Row> rows(s.rows);
  for (int64_t visit = begin; visit < end; ++visit) {
    const int64_t query = s.visits[visit], next = s.visits[std::min(visit + kAhead, end - 1)];
    for (int64_t level = 0; level < s.levels; ++level)
      __builtin_prefetch(s.centers + level * s.queries + next);
    for (int64_t row = 0; row < s.rows; row += 16) {
      __builtin_prefetch(s.starts + next * s.rows + row, 1);
      __builtin_prefetch(s.stops + next * s.rows + row, 1);
    }
    if (query < 0 || query >= s.queries) continue;
    for (int64_t row = 0; row < s.rows; ++row) {
      const int64_t middle = s.centers[s.level[row] * s.queries + query] + s.offset[row];
      Row& last = rows[row];
      if (!last.found || middle != last.middle) {
        last.found = true;
        last.middle = middle;
        last.start = first_not_below(s.keys, s.n_keys, middle - s.radius[row], last.start);
        last.stop = first_not_below(s.keys, s.n_keys, middle + s.radius[row] + 1, last.start);
      }
      s.starts[query * s.rows + row] = int32_t(last.start);
      s.stops[query * s.rows + row] = int32_t(last.stop);
    }
  }
}

}  // namespace vicinal
