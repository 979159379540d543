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
  // `slices` must outlive the schedule. With several threads, list_groups() and find_predecessors()
  // come before the first ticket.
  BackwardSchedule(const NeighborSlices& slices, int64_t tile_queries, int64_t tiles_per_chunk)
      : n_tiles((slices.n_queries + tile_queries - 1) / tile_queries),
        tiles_per_chunk(tiles_per_chunk),
        n_chunks((n_tiles + tiles_per_chunk - 1) / tiles_per_chunk),
        slices_(slices),
        queries_per_chunk_(tile_queries * tiles_per_chunk),
        stride_(coprime_stride(n_chunks)),
        runs_(n_chunks),
        predecessors_(n_chunks),
        finished_heads_(n_chunks, 0) {}

  // Lists the groups of positions that each chunk accesses. Every thread calls it.
  void list_groups() {
    int64_t ticket = take();
    if (ticket >= n_chunks) return;
    GroupList list{{}, std::vector<int32_t>(n_groups(), -1)};
    for (; ticket < n_chunks; ticket = take()) {
      const int64_t begin = chunk_of(ticket) * queries_per_chunk_;
      const int64_t end = std::min(begin + queries_per_chunk_, slices_.n_queries);
      list.runs.clear();
      for (int64_t i = begin; i < end; ++i) add_query(slices_.traversal[i], ticket, list);
      runs_[ticket].assign(list.runs.begin(), list.runs.end());
    }
  }

  // Finds the predecessors of each chunk. One thread calls it, when all have listed groups.
  void find_predecessors() {
    std::vector<int32_t> last_ticket(n_groups(), -1);   // by group, the latest that accesses it
    std::vector<int32_t> last_successor(n_chunks, -1);  // the latest ticket that waits for each
    for (int64_t ticket = 0; ticket < n_chunks; ++ticket)
      for (const GroupRun& run : runs_[ticket])
        for (int32_t group = run.first; group < run.stop; ++group) {
          const int32_t predecessor = std::exchange(last_ticket[group], ticket);
          if (predecessor >= 0 && std::exchange(last_successor[predecessor], ticket) != ticket)
            predecessors_[ticket].push_back(predecessor);
        }
    std::vector<std::vector<GroupRun>>().swap(runs_);  // frees the memory
    next_ = 0;
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
  struct GroupRun {
    int32_t first, stop;
  };
  // Of one thread, since lists of several threads would share cache lines.
  struct GroupList {
    std::vector<GroupRun> runs;        // of the current ticket
    std::vector<int32_t> last_ticket;  // by group, the latest that listed it
  };

  // The golden section of the number of chunks (0.382), which spreads consecutive tickets evenly.
  static int64_t coprime_stride(int64_t n_chunks) {
    int64_t stride = std::max<int64_t>(1, n_chunks * 382 / 1000);
    while (std::gcd(stride, n_chunks) > 1) ++stride;
    return stride;
  }

  int64_t n_groups() const { return slices_.n_points / kPositionsPerGroup + 1; }

  void add_query(int64_t query, int32_t ticket, GroupList& list) const {
    if (query < 0 || query >= slices_.n_queries) return;
    for (int64_t slice = 0; slice < slices_.n_slices; ++slice) {
      const int64_t index = query * slices_.n_slices + slice;
      const int64_t start = slices_.start(index), stop = slices_.stop(index);
      if (start >= stop) continue;
      const int32_t last = (stop - 1) / kPositionsPerGroup;
      for (int32_t group = start / kPositionsPerGroup; group <= last; ++group)
        if (std::exchange(list.last_ticket[group], ticket) != ticket) add_group(list.runs, group);
    }
  }

  static void add_group(std::vector<GroupRun>& runs, int32_t group) {
    if (!runs.empty() && runs.back().stop == group) ++runs.back().stop;
    else runs.push_back({group, group + 1});
  }

  const NeighborSlices& slices_;
  const int64_t queries_per_chunk_, stride_;
  int64_t next_ = 0;
  std::vector<std::vector<GroupRun>> runs_;         // [n_chunks], by ticket, until predecessors
  std::vector<std::vector<int32_t>> predecessors_;  // [n_chunks], tickets by ticket
  std::vector<int32_t> finished_heads_;             // [n_chunks], by ticket
};

}  // namespace vicinal
