// What the torch side of the CPU back end (cpu.cpp) and its kernels (cpu_kernels.h) share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

namespace vicinal {

// Which points a query sees: row i sees order[starts[i, r]:stops[i, r]] for every r < slices.
struct Slices {
  const int32_t *visits, *starts, *stops, *order;
  int64_t rows, slices;
  int64_t points;  // as many stand in order, and are numbered
};

// A [rows, heads, width] tensor whose channels stand side by side.
struct Rows {
  void* data = nullptr;
  int64_t row_stride = 0, head_stride = 0, width = 0;
};

struct Dropout {
  bool active = false;
  uint32_t key = 0, threshold = 0;
  double keep_scale = 1;
};

// The empty cells: see vicinal.attention.Background.
struct Background {
  bool active = false;
  Rows query;      // [N * L, H, d]
  Rows key;        // [K, H, d]
  Rows value;      // [B * L, H, dv]
  int64_t images = 0, levels = 0, slots = 0;
  const int64_t* windows = nullptr;      // [L], widths
  const int64_t* level_rows = nullptr;   // [L], window rows, w ** (P - 1)
  const int32_t *query_batch = nullptr, *center_columns = nullptr, *point_columns = nullptr;
  // Backward only. Partial sums are per chunk of tiles, so that threads share none of them.
  Rows grad_query;                                            // like query
  void *grad_key_parts = nullptr, *grad_value_parts = nullptr;  // [chunks, K | B * L, H, d | dv]
};

struct Problem {
  int64_t heads = 0;
  double scale = 1;
  Slices queries;
  const bool* query_mask = nullptr;
  Dropout dropout;
  Background background;
  Rows q, k, v, out;
  void* lse = nullptr;  // [N, H] in the type of the sums
  const void* grad_lse = nullptr;
  Rows grad_out, grad_q;
  Rows grad_k, grad_v;  // in the type of the sums, zero at first
};

// Rows turned by angles coordinates @ frequencies; coordinates and frequencies are in the type of
// the sums, and so are the gradients of both.
struct Rotation {
  int64_t heads = 0, pairs = 0, coordinates_per_row = 0;  // pairs in all heads together
  const void *coordinates = nullptr, *frequencies = nullptr;  // [n, C], [C, pairs]
  Rows x, out;
  Rows grad_out, grad_x;
  void *grad_coordinates = nullptr, *grad_frequency_parts = nullptr;  // [n, C], [items, C, pairs]
};

enum class Storage { float32, float64, float16, bfloat16 };

inline void sort_numbers(uint64_t* numbers, int64_t count) {
  std::sort(numbers, numbers + count);
}

// Threads take items one by one until none is left; an item is a run of tiles (or of rows).
struct Work {
  Work(int64_t tiles, int64_t tiles_per_item)
      : tiles(tiles), tiles_per_item(tiles_per_item < 1 ? 1 : tiles_per_item) {}

  const int64_t tiles, tiles_per_item;
  int64_t next = 0;

  int64_t items() const { return (tiles + tiles_per_item - 1) / tiles_per_item; }
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

// The order in which chunks of tiles add to the gradients of points. A chunk waits for those before
// it that share a point with it, so a point's gradient is summed in the same order whatever the
// number of threads. Turns jump about the chunks, since neighbors share points and would wait.
class Schedule {
 public:
  Schedule(const Slices& queries, int64_t tile_queries, int64_t tiles_per_chunk, int64_t threads)
      : tiles((queries.rows + tile_queries - 1) / tile_queries),
        tiles_per_chunk(tiles_per_chunk),
        chunks((tiles + tiles_per_chunk - 1) / tiles_per_chunk),
        step_(coprime_step(chunks)),
        waits_for_(chunks),
        finished_(chunks, 0) {
    if (threads > 1) find_shared_points(queries, tile_queries * tiles_per_chunk);
  }

  int64_t take() { return __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED); }
  int64_t chunk_at(int64_t turn) const { return turn * step_ % chunks; }

  // Begins when all turns that this one waits for are over. Turns are taken in order, so those are
  // over or under way; and a turn that ends with an exception ends as well.
  class Turn {
   public:
    Turn(Schedule& schedule, int64_t turn) : finished_(schedule.finished_[turn]) {
      for (int32_t earlier : schedule.waits_for_[turn])
        while (!__atomic_load_n(&schedule.finished_[earlier], __ATOMIC_ACQUIRE))
          std::this_thread::yield();
    }
    ~Turn() { __atomic_store_n(&finished_, 1, __ATOMIC_RELEASE); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

   private:
    uint8_t& finished_;
  };

  const int64_t tiles, tiles_per_chunk, chunks;

 private:
  static int64_t coprime_step(int64_t chunks) {
    int64_t step = std::max<int64_t>(1, chunks * 382 / 1000);  // the golden section: far apart
    while (std::gcd(step, chunks) > 1) ++step;
    return step;
  }

  void find_shared_points(const Slices& queries, int64_t queries_per_chunk) {
    std::vector<int32_t> last_turn(queries.points, -1), noted(chunks, -1);
    for (int64_t turn = 0; turn < chunks; ++turn) {
      const int64_t first = chunk_at(turn) * queries_per_chunk;
      const int64_t stop = std::min(first + queries_per_chunk, queries.rows);
      for (int64_t place = first; place < stop; ++place) {
        const int64_t query = queries.visits[place];
        if (query < 0 || query >= queries.rows) continue;
        for (int64_t slice = 0; slice < queries.slices; ++slice)
          note(queries, query * queries.slices + slice, turn, last_turn, noted);
      }
    }
  }

  void note(const Slices& queries, int64_t at, int32_t turn, std::vector<int32_t>& last_turn,
            std::vector<int32_t>& noted) {
    const int64_t stop = std::min<int64_t>(queries.stops[at], queries.points);
    for (int64_t place = std::max(queries.starts[at], 0); place < stop; ++place) {
      const int32_t earlier = std::exchange(last_turn[place], turn);
      if (earlier < 0 || earlier == turn || noted[earlier] == turn) continue;
      noted[earlier] = turn;
      waits_for_[turn].push_back(earlier);
    }
  }

  const int64_t step_;
  int64_t next_ = 0;
  std::vector<std::vector<int32_t>> waits_for_;
  std::vector<uint8_t> finished_;
};

}  // namespace vicinal
