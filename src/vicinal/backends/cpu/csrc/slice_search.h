// The neighbors of every query as slices of the sorted points, found by searching the sorted cell
// keys for both ends of every window row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "params.h"

namespace vicinal {

// Window row r of query n has the width[r] cell keys from query_keys[level[r], n] + first[r] on.
struct SliceSearch {
  const int64_t* keys;                     // [n_keys], sorted cell keys of the points
  int64_t n_keys;
  const int64_t* query_keys;               // [L, N], key of the window's first cell per level
  const int32_t* traversal;                // [N]
  int64_t n_queries, n_rows, n_levels;     // N, S, L
  const int64_t *level, *first, *width;    // [S], per window row
  int32_t *starts, *stops;                 // [N, S], output
};

// Lower bounds in sorted keys. The keys are divided into buckets of equal key range, and a table
// has the position of each bucket's first key. Where keys are dense enough, a bucket is one key and
// the lookup needs no search.
class SortedKeyIndex {
 public:
  SortedKeyIndex(const int64_t* keys, int64_t n_keys) : keys_(keys), n_keys_(n_keys) {
    if (n_keys == 0 || !std::is_sorted(keys, keys + n_keys)) return;  // invalid input: no table
    while (bucket_of(keys[n_keys - 1]) > kBucketsPerKey * uint64_t(n_keys)) ++shift_;
    bucket_starts_.resize(bucket_of(keys[n_keys - 1]) + 1);
    int64_t position = 0;
    for (uint64_t bucket = 0; bucket < bucket_starts_.size(); ++bucket) {
      while (bucket_of(keys[position]) < bucket) ++position;
      bucket_starts_[bucket] = int32_t(position);
    }
  }

  // The first position whose key is not less than `key`.
  int64_t lower_bound(int64_t key) const {
    if (bucket_starts_.empty()) return std::lower_bound(keys_, keys_ + n_keys_, key) - keys_;
    if (key <= keys_[0]) return 0;
    if (key > keys_[n_keys_ - 1]) return n_keys_;
    int64_t low = bucket_starts_[bucket_of(key)];
    if (keys_[low] >= key) return low;
    // Galloping search: doubling steps bracket the result, then a binary search.
    int64_t step = 1;
    while (low + step < n_keys_ && keys_[low + step] < key) low += step, step *= 2;
    return std::lower_bound(keys_ + low, keys_ + std::min(low + step, n_keys_), key) - keys_;
  }

 private:
  static constexpr uint64_t kBucketsPerKey = 16;

  uint64_t bucket_of(int64_t key) const { return (uint64_t(key) - uint64_t(keys_[0])) >> shift_; }

  const int64_t* keys_;  // [n_keys]
  const int64_t n_keys_;
  int shift_ = 0;  // a bucket has 2 ** shift_ keys
  std::vector<int32_t> bucket_starts_;  // [buckets]
};

// Invalid input may overflow, which is undefined for signed integers.
inline int64_t wrapping_add(int64_t a, int64_t b) { return int64_t(uint64_t(a) + uint64_t(b)); }

// Prefetches what a query reads and writes.
VICINAL_INLINE inline void prefetch_query(const SliceSearch& s, int64_t query) {
  if (query < 0 || query >= s.n_queries) return;
  for (int64_t level = 0; level < s.n_levels; ++level)
    __builtin_prefetch(&s.query_keys[level * s.n_queries + query]);
  for (int64_t row = 0; row < s.n_rows; row += 16) {
    __builtin_prefetch(&s.starts[query * s.n_rows + row], 1);
    __builtin_prefetch(&s.stops[query * s.n_rows + row], 1);
  }
}
constexpr int64_t kPrefetchDistance = 8;  // queries

// Finds the slices of traversal[begin:end]. Consecutive queries of the traversal are neighbors in
// space: on coarse levels most have the same window, whose slices are reused.
inline void search_slices(const SliceSearch& s, const SortedKeyIndex& index, int64_t begin,
                          int64_t end) {
  std::vector<int64_t> keys(s.n_levels);                  // [L], of the previous query
  std::vector<uint8_t> changed(s.n_levels);               // [L]
  std::vector<int32_t> starts(s.n_rows), stops(s.n_rows);  // [S]
  bool is_first = true;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kPrefetchDistance < end) prefetch_query(s, s.traversal[i + kPrefetchDistance]);
    const int64_t query = s.traversal[i];
    if (query < 0 || query >= s.n_queries) continue;
    for (int64_t level = 0; level < s.n_levels; ++level) {
      const int64_t key = s.query_keys[level * s.n_queries + query];
      changed[level] = is_first || key != keys[level];
      keys[level] = key;
    }
    is_first = false;
    for (int64_t row = 0; row < s.n_rows; ++row) {
      if (!changed[s.level[row]]) continue;
      const int64_t first = wrapping_add(keys[s.level[row]], s.first[row]);
      starts[row] = int32_t(index.lower_bound(first));
      stops[row] = int32_t(index.lower_bound(wrapping_add(first, s.width[row])));
    }
    std::copy(starts.begin(), starts.end(), s.starts + query * s.n_rows);
    std::copy(stops.begin(), stops.end(), s.stops + query * s.n_rows);
  }
}

}  // namespace vicinal
