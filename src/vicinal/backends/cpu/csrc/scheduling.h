// Work distribution over threads: a dynamic work queue, and the order in which chunks of tiles
// accumulate gradients, which makes results independent of the number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "params.h"

namespace vicinal {

// Dynamic scheduling: threads take the next chunk of units (tiles or rows) until none is left.
class WorkQueue {
 public:
  WorkQueue(int64_t n_units, int64_t units_per_chunk)
      : n_chunks((n_units + units_per_chunk - 1) / units_per_chunk),
        n_units_(n_units),
        units_per_chunk_(units_per_chunk) {}

  // Returns n_chunks or more when the queue is empty.
  int64_t take() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }
  // The units [begin, end) of a chunk.
  int64_t begin(int64_t chunk) const { return chunk * units_per_chunk_; }
  int64_t end(int64_t chunk) const { return std::min(begin(chunk) + units_per_chunk_, n_units_); }

  const int64_t n_chunks;

 private:
  const int64_t n_units_, units_per_chunk_;
  int64_t next_ = 0;
};

// A deterministic order of the backward pass's scatter-adds. Threads take tickets, and each ticket
// is a chunk of tiles. Before a chunk adds to the gradients of points, it waits for the chunks with
// earlier tickets that share a point with it. So each gradient is summed in ticket order, for any
// number of threads. Adjacent chunks share points, so consecutive tickets map to distant chunks.
class BackwardSchedule {
 public:
  BackwardSchedule(const NeighborSlices& slices, int64_t tile_queries, int64_t tiles_per_chunk,
                   int64_t n_threads)
      : n_tiles((slices.n_queries + tile_queries - 1) / tile_queries),
        tiles_per_chunk(tiles_per_chunk),
        n_chunks((n_tiles + tiles_per_chunk - 1) / tiles_per_chunk),
        stride_(coprime_stride(n_chunks)),
        predecessors_(n_chunks),
        finished_heads_(n_chunks, 0) {
    if (n_threads > 1) find_predecessors(slices, tile_queries * tiles_per_chunk);
  }

  // Returns n_chunks or more when no ticket is left.
  int64_t take() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }
  int64_t chunk_of(int64_t ticket) const { return ticket * stride_ % n_chunks; }

  // Synchronizes one chunk. The destructor releases all heads, also after an exception.
  class Ticket {
   public:
    Ticket(BackwardSchedule& schedule, int64_t ticket)
        : predecessors_(schedule.predecessors_[ticket]),
          finished_heads_(schedule.finished_heads_.data()),
          own_finished_heads_(schedule.finished_heads_[ticket]) {}
    ~Ticket() { release(std::numeric_limits<int32_t>::max()); }
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;

    // Waits until all predecessors have finished a head. There is no deadlock: tickets are taken in
    // order, so every predecessor is running or done.
    void wait(int32_t head) const {
      for (int32_t predecessor : predecessors_)
        while (__atomic_load_n(finished_heads_ + predecessor, __ATOMIC_ACQUIRE) <= head)
          std::this_thread::yield();
    }
    // Tells the successors that the first `n_heads` heads of this chunk are finished.
    void release(int32_t n_heads) {
      __atomic_store_n(&own_finished_heads_, n_heads, __ATOMIC_RELEASE);
    }

   private:
    const std::vector<int32_t>& predecessors_;  // tickets
    const int32_t* finished_heads_;             // [n_chunks]
    int32_t& own_finished_heads_;
  };

  const int64_t n_tiles, tiles_per_chunk, n_chunks;

 private:
  // Dependencies are tracked per group of this many positions of the sorted order. Coarse groups
  // only add waits.
  static constexpr int64_t kPositionsPerGroup = 8;

  // The golden section of the number of chunks (0.382), which spreads consecutive tickets evenly.
  static int64_t coprime_stride(int64_t n_chunks) {
    int64_t stride = std::max<int64_t>(1, n_chunks * 382 / 1000);
    while (std::gcd(stride, n_chunks) > 1) ++stride;
    return stride;
  }

  void find_predecessors(const NeighborSlices& slices, int64_t queries_per_chunk) {
    last_ticket_.assign(slices.n_points / kPositionsPerGroup + 1, -1);
    last_successor_.assign(n_chunks, -1);
    for (int64_t ticket = 0; ticket < n_chunks; ++ticket) {
      const int64_t begin = chunk_of(ticket) * queries_per_chunk;
      const int64_t end = std::min(begin + queries_per_chunk, slices.n_queries);
      for (int64_t i = begin; i < end; ++i) add_query(slices, slices.traversal[i], ticket);
    }
    last_ticket_ = {}, last_successor_ = {};  // free the memory: only this function needs it
  }

  void add_query(const NeighborSlices& slices, int64_t query, int32_t ticket) {
    if (query < 0 || query >= slices.n_queries) return;
    for (int64_t slice = 0; slice < slices.n_slices; ++slice) {
      const int64_t index = query * slices.n_slices + slice;
      const int64_t start = slices.start(index), stop = slices.stop(index);
      if (start < stop)
        add_groups(start / kPositionsPerGroup, (stop - 1) / kPositionsPerGroup, ticket);
    }
  }

  void add_groups(int64_t first, int64_t last, int32_t ticket) {
    for (int64_t group = first; group <= last; ++group) {
      const int32_t predecessor = std::exchange(last_ticket_[group], ticket);
      if (predecessor < 0 || predecessor == ticket) continue;
      if (std::exchange(last_successor_[predecessor], ticket) == ticket) continue;
      predecessors_[ticket].push_back(predecessor);
    }
  }

  const int64_t stride_;
  int64_t next_ = 0;
  std::vector<std::vector<int32_t>> predecessors_;  // [n_chunks], tickets by ticket
  std::vector<int32_t> finished_heads_;             // [n_chunks], by ticket
  std::vector<int32_t> last_ticket_;     // [groups], latest ticket that accesses each group
  std::vector<int32_t> last_successor_;  // [n_chunks], latest ticket that waits for each ticket
};

}  // namespace vicinal
