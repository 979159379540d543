// Where the rows of windows begin and end among sorted keys.
#pragma once

#include "problem.h"

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

// Looks up where keys stand among sorted ones: a table has the place where each run of keys begins,
// of single keys where they are dense enough, and there the search is over.
class Places {
 public:
  Places(const int64_t* keys, int64_t n_keys) : keys_(keys), n_keys_(n_keys) {
    if (n_keys == 0 || !std::is_sorted(keys, keys + n_keys)) return;  // unsorted: no table
    while (run_of(keys[n_keys - 1]) > kRunsPerKey * uint64_t(n_keys)) ++shift_;
    begins_.resize(run_of(keys[n_keys - 1]) + 1);
    int64_t place = 0;
    for (uint64_t run = 0; run < begins_.size(); ++run) {
      while (run_of(keys[place]) < run) ++place;
      begins_[run] = int32_t(place);
    }
  }

  // The first place whose key is not below `key`.
  int64_t first_not_below(int64_t key) const {
    if (begins_.empty()) return std::lower_bound(keys_, keys_ + n_keys_, key) - keys_;
    if (key <= keys_[0]) return 0;
    if (key > keys_[n_keys_ - 1]) return n_keys_;
    int64_t low = begins_[run_of(key)];
    if (keys_[low] >= key) return low;
    // The last key is not below: doubling steps find a place that is not, and bisection the first.
    int64_t step = 1;
    while (low + step < n_keys_ && keys_[low + step] < key) low += step, step *= 2;
    return std::lower_bound(keys_ + low, keys_ + std::min(low + step, n_keys_), key) - keys_;
  }

 private:
  static constexpr uint64_t kRunsPerKey = 16;

  uint64_t run_of(int64_t key) const { return (uint64_t(key) - uint64_t(keys_[0])) >> shift_; }

  const int64_t* keys_;
  const int64_t n_keys_;
  int shift_ = 0;
  std::vector<int32_t> begins_;
};

// Wraps around where contents are absurd.
inline int64_t wrapping_sum(int64_t a, int64_t b) { return int64_t(uint64_t(a) + uint64_t(b)); }

// Asks for what a query reads and writes before its turn.
VICINAL_INLINE inline void prefetch_rows(const RowSearch& s, int64_t query) {
  if (query < 0 || query >= s.queries) return;
  for (int64_t level = 0; level < s.levels; ++level)
    __builtin_prefetch(&s.centers[level * s.queries + query]);
  for (int64_t row = 0; row < s.rows; row += 16) {
    __builtin_prefetch(&s.starts[query * s.rows + row], 1);
    __builtin_prefetch(&s.stops[query * s.rows + row], 1);
  }
}
constexpr int64_t kAhead = 8;  // queries

// Queries next to each other in `visits` are neighbors in space: on coarse levels most fall into
// the same cell, and see the same.
inline void find_rows(const RowSearch& s, const Places& places, int64_t begin, int64_t end) {
  std::vector<int64_t> centers(s.levels);
  std::vector<uint8_t> moved(s.levels);
  std::vector<int32_t> starts(s.rows), stops(s.rows);
  bool first = true;
  for (int64_t visit = begin; visit < end; ++visit) {
    if (visit + kAhead < end) prefetch_rows(s, s.visits[visit + kAhead]);
    const int64_t query = s.visits[visit];
    if (query < 0 || query >= s.queries) continue;
    for (int64_t level = 0; level < s.levels; ++level) {
      const int64_t center = s.centers[level * s.queries + query];
      moved[level] = first || center != centers[level];
      centers[level] = center;
    }
    first = false;
    for (int64_t row = 0; row < s.rows; ++row) {
      if (!moved[s.level[row]]) continue;
      const int64_t middle = wrapping_sum(centers[s.level[row]], s.offset[row]);
      starts[row] = int32_t(places.first_not_below(wrapping_sum(middle, -s.radius[row])));
      stops[row] = int32_t(places.first_not_below(wrapping_sum(middle, s.radius[row] + 1)));
    }
    std::copy(starts.begin(), starts.end(), s.starts + query * s.rows);
    std::copy(stops.begin(), stops.end(), s.stops + query * s.rows);
  }
}

}  // namespace vicinal
