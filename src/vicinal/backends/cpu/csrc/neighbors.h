// What a tile of queries sees, for one instruction set: see vectors.h.

namespace vicinal::VICINAL_ISA {

// As many numbers as a vector holds, at any address.
typedef int32_t Numbers __attribute__((vector_size(VICINAL_BYTES), aligned(4), may_alias));
constexpr int kNumbers = VICINAL_BYTES / sizeof(int32_t);
constexpr int kFill = 16;  // lists are filled up to a multiple of this

// Slots of what a query sees; filled up with slot 0.
struct List {
  const int32_t* slots;
  int64_t count;
};

// The queries of a tile, the points that any of them sees, numbered by slots, and for each query
// the slots of what it sees. Slices, orders and visits may hold anything: nothing but valid rows
// and points comes out. Slot 0 is nobody's.
//
// Places of the order that are seen are marked as bits of words. Their slots follow one another
// within a word, so that of what a slice has in a word only the first needs to be looked up. On
// coarse levels a query mostly sees what the one before it sees: the last slices that are equal are
// not walked again.
class Neighbors {
 public:
  Neighbors(const Slices& slices, int64_t tile_queries)
      : slices_(slices),
        tile_queries_(tile_queries),
        words_(slices.points / 64 + 1),
        to_end_(slices.slices) {}

  void find(int64_t tile, const bool* mask) {
    find_queries(tile, mask);
    slots_.reserve(mark_places() + tile_queries_ * kFill + kNumbers);
    number_points();
    int64_t end = 0;
    for (int lane = 0; lane < tile_queries_; ++lane) {
      first_[lane] = end;
      int32_t* list = &slots_[end];
      counts_[lane] = present[lane] ? write_list(lane, list) : 0;
      std::fill_n(list + counts_[lane], kFill, 0);
      end += (counts_[lane] + kFill - 1) / kFill * kFill;
    }
    for (int64_t word : marked_) words_[word].seen = 0;
    marked_.clear();
  }

  List list(int lane) const { return {slots_.get() + first_[lane], counts_[lane]}; }

  int64_t rows[kMaxTile];   // the tile's queries, -1 where it has fewer
  bool present[kMaxTile];   // whether they take part
  Buffer<int32_t> points;   // of every slot
  int64_t slot_count = 1;

 private:
  struct Word {
    uint64_t seen = 0;
    int32_t first_slot = 0;
  };

  void find_queries(int64_t tile, const bool* mask) {
    for (int lane = 0; lane < tile_queries_; ++lane) {
      const int64_t visit = tile * tile_queries_ + lane;
      const int64_t row = visit < slices_.rows ? slices_.visits[visit] : -1;
      rows[lane] = row >= 0 && row < slices_.rows ? row : -1;
      present[lane] = rows[lane] >= 0 && !(mask && mask[row]);
      for (int64_t at = 0; present[lane] && at < slices_.slices; at += 16) {
        __builtin_prefetch(slices_.starts + row * slices_.slices + at);
        __builtin_prefetch(slices_.stops + row * slices_.slices + at);
      }
    }
  }

  // Calls body(word, bits) for the places of a slice.
  template <typename Body>
  void for_words(int64_t slice, const Body& body) {
    const int64_t start = slices_.start(slice), stop = std::max(slices_.stop(slice), start);
    uint64_t from = ~uint64_t(0) << start % 64;
    int64_t word = start / 64;
    for (; stop - word * 64 > 64; ++word, from = ~uint64_t(0)) body(word, from);
    body(word, from & below(stop - word * 64));
  }
  // The lowest `count` bits, of at most 64, in two shifts that are each defined.
  static uint64_t below(uint64_t count) {
    return (uint64_t(1) << count / 2 << (count - count / 2)) - 1;
  }

  // Marks all places that are seen. Returns how much room the lists take at most.
  int64_t mark_places() {
    int64_t room = 0;
    for (int lane = 0; lane < tile_queries_; ++lane) {
      if (!present[lane]) continue;
      const int64_t first = rows[lane] * slices_.slices;
      walked_[lane] = slices_.slices - equal_to_previous(lane);
      for (int64_t slice = first; slice < first + walked_[lane]; ++slice)
        for_words(slice, [&](int64_t word, uint64_t bits) {
          if (!words_[word].seen && bits) marked_.push_back(word);
          words_[word].seen |= bits;
        });
      for (int64_t slice = first; slice < first + slices_.slices; ++slice)
        room += std::max<int64_t>(slices_.stop(slice) - slices_.start(slice), 0);
    }
    return room;
  }

  // How many of a query's last slices are those of the one before it.
  int64_t equal_to_previous(int lane) const {
    if (lane == 0 || !present[lane - 1]) return 0;
    const int64_t own = (rows[lane] + 1) * slices_.slices;
    const int64_t previous = (rows[lane - 1] + 1) * slices_.slices;
    int64_t equal = 0;
    while (equal < slices_.slices &&
           slices_.starts[own - 1 - equal] == slices_.starts[previous - 1 - equal] &&
           slices_.stops[own - 1 - equal] == slices_.stops[previous - 1 - equal])
      ++equal;
    return equal;
  }

  // Gives a slot to every place that is marked and has a point.
  void number_points() {
    int64_t most = 1;
    for (int64_t at : marked_) most += __builtin_popcountll(words_[at].seen);
    points.reserve(most);
    points[0] = -1;
    slot_count = 1;
    for (int64_t at : marked_) {
      Word& word = words_[at];
      word.first_slot = slot_count;
      for (uint64_t left = word.seen; left; left &= left - 1) {
        const int bit = __builtin_ctzll(left);
        const int32_t point = slices_.order[at * 64 + bit];
        if (point < 0 || point >= slices_.points) word.seen &= ~(uint64_t(1) << bit);
        else points[slot_count++] = point;
      }
    }
  }

  // Returns how many slots it has.
  int64_t write_list(int lane, int32_t* const list) {
    const int64_t first = rows[lane] * slices_.slices, walked = walked_[lane];
    int32_t* end = list;
    for (int64_t slice = 0; slice < walked; ++slice) {
      to_end_[slice] = list - end;
      for_words(first + slice, [&](int64_t index, uint64_t bits) {
        const Word& word = words_[index];
        const int32_t slot =
            word.first_slot + __builtin_popcountll(word.seen & ((bits & -bits) - 1));
        end = write(end, __builtin_popcountll(word.seen & bits),
                    [&](int64_t at) { return count_up() + (slot + int32_t(at)); });
      });
    }
    if (walked < slices_.slices) {
      const int32_t* rest = slots_.get() + first_[lane - 1] + counts_[lane - 1] - to_end_[walked];
      end = write(end, to_end_[walked],
                  [&](int64_t at) { return *reinterpret_cast<const Numbers*>(rest + at); });
    }
    for (int64_t slice = 0; slice < walked; ++slice) to_end_[slice] += end - list;
    return end - list;
  }

  // Writes a vector of slots at a time, and so more than there are, rather than take a branch that
  // nobody can foresee. Returns where they end.
  template <typename Source>
  static int32_t* write(int32_t* to, int64_t count, const Source& source) {
    int64_t at = 0;
    do *reinterpret_cast<Numbers*>(to + at) = source(at);
    while ((at += kNumbers) < count);
    return to + count;
  }
  static Numbers count_up() {
    Numbers numbers;
#pragma GCC unroll 16
    for (int i = 0; i < kNumbers; ++i) numbers[i] = i;
    return numbers;
  }

  const Slices& slices_;
  const int64_t tile_queries_;
  int64_t first_[kMaxTile], counts_[kMaxTile];  // of each query among slots_
  int64_t walked_[kMaxTile];                    // its slices that differ from those of the last
  Buffer<int32_t> slots_;
  std::vector<Word> words_;       // of the order
  std::vector<int64_t> marked_;   // those with places that are seen
  std::vector<int64_t> to_end_;   // of the last list, from where each slice begins
};

}  // namespace vicinal::VICINAL_ISA
