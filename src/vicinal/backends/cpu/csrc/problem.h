// What the torch side of the CPU back end (ops.cpp) and its kernels (kernels.h) share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

// For what is only fast, or only does anything, as a part of its caller.
#define VICINAL_INLINE __attribute__((always_inline))

namespace vicinal {

constexpr int kMaxTile = 256;  // queries in a tile, at most

// Uninitialised memory that grows by half more than is asked for.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { reserve(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  void reserve(int64_t count) {
    if (count <= capacity_) return;
    const int64_t room = count + count / 2;
    void* grown = ::operator new(room * sizeof(T), std::align_val_t(64));
    ::operator delete(data_, std::align_val_t(64));
    data_ = static_cast<T*>(grown);
    capacity_ = room;
  }
  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](int64_t index) { return data_[index]; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Which points a query sees: row i sees order[starts[i, r]:stops[i, r]] for every r < slices.
struct Slices {
  const int32_t *visits, *starts, *stops, *order;
  int64_t rows, slices;
  int64_t points;  // as many stand in order, and are numbered

  // Within the order, whatever the slices hold.
  int64_t start(int64_t at) const { return std::clamp<int64_t>(starts[at], 0, points); }
  int64_t stop(int64_t at) const { return std::min<int64_t>(stops[at], points); }
};

enum class Storage { float32, float64, float16, bfloat16 };

// A [rows, heads, width] tensor whose channels stand side by side.
struct Rows {
  void* data = nullptr;
  int64_t heads = 0, width = 0, row_stride = 0, head_stride = 0;
  Storage storage = Storage::float32;
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
  Rows grad_query;                        // like query
  Rows grad_key_parts, grad_value_parts;  // [chunks * K, H, d], [chunks * B * L, H, dv]
};

struct Problem {
  int64_t heads = 0, tile_queries = 0;
  double scale = 1;
  Slices queries;
  const bool* query_mask = nullptr;
  Dropout dropout;
  Background background;
  Rows q, k, v, out;
  void* lse = nullptr;  // [N, H] in the type of the sums
  const void* grad_lse = nullptr;
  Rows grad_out, grad_q;
  Rows grad_k, grad_v;      // in the type of the sums
  int32_t* touched = nullptr;  // [nnz], the first of their heads that hold nothing yet
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

// Threads take items one by one until none is left; an item is a run of tiles (or of rows).
struct Work {
  Work(int64_t tiles, int64_t tiles_per_item)
      : tiles(tiles), tiles_per_item(tiles_per_item < 1 ? 1 : tiles_per_item) {}

  const int64_t tiles, tiles_per_item;
  int64_t next = 0;

  int64_t items() const { return (tiles + tiles_per_item - 1) / tiles_per_item; }
  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

// The order in which chunks of tiles add to the gradients of points. Before it adds, a chunk waits
// for those before it that share a point with it, so a point's gradient is summed in the same order
// whatever the number of threads. Turns jump about the chunks, since neighbors share points.
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

  // A chunk's part in the order: over when it goes out of scope, also by an exception.
  class Turn {
   public:
    Turn(Schedule& schedule, int64_t turn)
        : waits_for_(schedule.waits_for_[turn]),
          finished_(schedule.finished_.data()),
          own_(schedule.finished_[turn]) {}
    ~Turn() { finish(std::numeric_limits<int32_t>::max()); }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;

    // Returns when all turns that this one waits for are done with a head. Turns are taken in
    // order, so those are over or under way.
    void wait(int32_t head) const {
      for (int32_t earlier : waits_for_)
        while (__atomic_load_n(finished_ + earlier, __ATOMIC_ACQUIRE) <= head)
          std::this_thread::yield();
    }
    // This turn is done with the first heads.
    void finish(int32_t heads) { __atomic_store_n(&own_, heads, __ATOMIC_RELEASE); }

   private:
    const std::vector<int32_t>& waits_for_;
    const int32_t* finished_;
    int32_t& own_;
  };

  const int64_t tiles, tiles_per_chunk, chunks;

 private:
  static int64_t coprime_step(int64_t chunks) {
    int64_t step = std::max<int64_t>(1, chunks * 382 / 1000);  // the golden section: far apart
    while (std::gcd(step, chunks) > 1) ++step;
    return step;
  }

  void find_shared_points(const Slices& queries, int64_t queries_per_chunk) {
    std::vector<int32_t> last_turn(queries.points / kShared + 1, -1), noted(chunks, -1);
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
    const int64_t start = queries.start(at), stop = queries.stop(at);
    if (start >= stop) return;
    for (int64_t run = start / kShared; run <= (stop - 1) / kShared; ++run) {
      const int32_t earlier = std::exchange(last_turn[run], turn);
      if (earlier < 0 || earlier == turn || noted[earlier] == turn) continue;
      noted[earlier] = turn;
      waits_for_[turn].push_back(earlier);
    }
  }

  // Points are told apart by runs of the order: to wait for a neighbor does no harm.
  static constexpr int64_t kShared = 8;

  const int64_t step_;
  int64_t next_ = 0;
  std::vector<std::vector<int32_t>> waits_for_;
  std::vector<int32_t> finished_;  // by turns, how many heads
};

}  // namespace vicinal
