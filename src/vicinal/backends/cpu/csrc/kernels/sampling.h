// Deformable sampling, forward and backward: sums of rows of a table, interpolated between the
// centers of cells. See kernels.h for how it is included.
//
// A location's corners are the 2^P cells around it. They are found in a hash table (see
// vicinal._index.cell_hash), again in the backward pass, and never stored.

namespace vicinal::VICINAL_ISA {

// 2^64 divided by the golden ratio, as in vicinal._index.cell_hash.
constexpr uint64_t kHashMultiplier = 0x9E3779B97F4A7C15;

// Real is the type of the table and the weights, Place that of the locations.
template <typename Real, typename Place>
class SamplingKernel {
  using V = Vector<Real>;

 public:
  explicit SamplingKernel(const SamplingParams& params)
      : p_(params),
        n_corners_(int64_t(1) << params.n_axes),
        n_locations_(params.n_levels * params.n_points),
        fractions_(n_locations_ * params.n_axes),
        keys_(n_locations_),
        entries_(n_locations_),
        rows_(n_locations_ * n_corners_),
        factors_(n_corners_),
        dots_(n_corners_) {}

  // Computes one row of the output.
  void forward(int64_t query, int64_t head) {
    const int64_t first = locate(query, head);
    Real* const out = row_of(p_.out, query, head);
    std::fill_n(out, p_.width, Real(0));
    const int64_t n_corners = n_corners_;
    for (int64_t location = 0; location < n_locations_; ++location) {
      interpolate(location, static_cast<const Real*>(p_.weights)[first + location]);
      const int64_t* const rows = &rows_[location * n_corners];
      for (int64_t corner = 0; corner < n_corners; ++corner) {
        const int64_t row = rows[corner];
        const Real factor = factors_[corner];
        if (row >= 0) add(out, factor, row_of(p_.table, row, head));
        else if (factor != factor) std::fill_n(out, p_.width, factor);  // as a row of zeros does
      }
    }
  }

  // Computes the gradients of a query's locations and weights, and adds its part to that of the
  // table, for one head.
  void backward(int64_t query, int64_t head) {
    const int64_t first = locate(query, head);
    const Real* const grad_out = row_of(p_.grad_out, query, head);
    for (int64_t location = 0; location < n_locations_; ++location) {
      const Real weight = static_cast<const Real*>(p_.weights)[first + location];
      interpolate(location, 1);
      Real grad_weight = 0;
      for (int64_t corner = 0; corner < n_corners_; ++corner) {
        const int64_t row = rows_[location * n_corners_ + corner];
        dots_[corner] = row < 0 ? Real(0) : dot(grad_out, row_of(p_.table, row, head));
        grad_weight += factors_[corner] * dots_[corner];
        if (row >= 0) add(row_of(p_.grad_table, row, head), weight * factors_[corner], grad_out);
      }
      static_cast<Real*>(p_.grad_weights)[first + location] = grad_weight;
      Place* const grad = static_cast<Place*>(p_.grad_locations) + (first + location) * p_.n_axes;
      for (int64_t axis = 0; axis < p_.n_axes; ++axis) grad[axis] = weight * slope(location, axis);
    }
  }

 private:
  // Head `head` of row `row` of a [rows, H, width] tensor.
  VICINAL_INLINE Real* row_of(void* data, int64_t row, int64_t head) const {
    return static_cast<Real*>(data) + (row * p_.n_heads + head) * p_.width;
  }

  // Finds the rows of the table at the corners of all locations of a query and head. Returns the
  // number of the first location. Each loop reads memory at random, so one after another they wait
  // less for it than one loop of all.
  int64_t locate(int64_t query, int64_t head) {
    const int64_t n = n_locations_, first = (query * p_.n_heads + head) * n;
    const int64_t image = std::clamp<int64_t>(p_.images[query], 0, p_.n_images - 1);
    int64_t* const keys = keys_.get();
    int64_t* const entries = entries_.get();
    for (int64_t level = 0; level < p_.n_levels; ++level) find_keys(first, image, level);
    for (int64_t i = 0; i < n; ++i) entries[i] = p_.starts[bucket_of(keys[i])];
    for (int64_t i = 0; i < n; ++i) entries[i] = find(keys[i], entries[i]);
    for (int64_t level = 0; level < p_.n_levels; ++level) find_rows(image, head, level);
    return first;
  }

  // The keys of the first corners of a level's locations, and where between its corners each lies.
  // A key wraps around for tables with any contents.
  void find_keys(int64_t first, int64_t image, int64_t level) {
    const int64_t n_axes = p_.n_axes, n_points = p_.n_points, n_levels = p_.n_levels;
    const Place* place =
        static_cast<const Place*>(p_.locations) + (first + level * n_points) * n_axes;
    Real* fractions = &fractions_[level * n_points * n_axes];
    int64_t* const keys = &keys_[level * n_points];
    const uint64_t origin = p_.origins[image * n_levels + level];
    for (int64_t point = 0; point < n_points; ++point) {
      uint64_t key = origin;
      for (int64_t axis = 0; axis < n_axes; ++axis) {
        const Place centered = *place++ - Place(0.5), floor = std::floor(centered);
        *fractions++ = Real(centered - floor);
        const int64_t cell = first_cell(floor, p_.sizes[level * n_axes + axis], p_.periodic[axis]);
        key += uint64_t(cell) * uint64_t(p_.steps[axis * n_levels + level]);
      }
      keys[point] = key;
    }
  }

  // The rows of the table at the corners of a level's locations, from their entries. They are
  // prefetched: most of the time would be spent waiting for them.
  void find_rows(int64_t image, int64_t head, int64_t level) {
    const int64_t n_corners = n_corners_, n_points = p_.n_points, n_cells = p_.n_cells;
    const int64_t empty = p_.has_background ? n_cells + image * p_.n_levels + level : -1;
    const int64_t* const entries = &entries_[level * n_points];
    int64_t* rows = &rows_[level * n_points * n_corners];
    for (int64_t point = 0; point < n_points; ++point, rows += n_corners) {
      std::fill_n(rows, n_corners, empty);
      if (entries[point] < 0) continue;
      const int32_t* const cells = p_.corners + entries[point] * n_corners;
      for (int64_t corner = 0; corner < n_corners; ++corner)
        if (cells[corner] >= 0 && cells[corner] < n_cells) {
          rows[corner] = cells[corner];
          prefetch_row(p_.table, cells[corner], head);
          if (p_.grad_table != nullptr) prefetch_row(p_.grad_table, cells[corner], head);
        }
    }
  }

  VICINAL_INLINE void prefetch_row(void* data, int64_t row, int64_t head) const {
    const char* const bytes = reinterpret_cast<const char*>(row_of(data, row, head));
    for (int64_t byte = 0, end = p_.width * sizeof(Real); byte < end; byte += 64)
      __builtin_prefetch(bytes + byte);
  }

  // All cells beyond the map are empty, so their distance does not matter. Those farther than kFar,
  // and NaN, are beyond it also along a periodic axis. Sizes are not converted to Place, which may
  // not represent those of large maps.
  static int64_t first_cell(Place cell, int64_t size, bool periodic) {
    constexpr Place kFar = Place(int64_t(1) << 62);
    if (periodic) {
      if (!(std::abs(cell) <= kFar)) return -2;
      size = std::max<int64_t>(size, 1);
      const int64_t remainder = int64_t(cell) % size;
      return remainder < 0 ? remainder + size : remainder;
    }
    return cell >= Place(-2) ? std::min(int64_t(std::min(cell, kFar)), size) : -2;  // -2 for NaN
  }

  uint64_t bucket_of(uint64_t key) const {
    return p_.bucket_bits == 0 ? 0 : key * kHashMultiplier >> (64 - p_.bucket_bits);
  }

  // The entry with this key of a bucket that starts at `entry`; -1 if there is none, where all
  // corners are empty.
  int64_t find(int64_t key, int64_t entry) const {
    const uint64_t bucket = bucket_of(key);
    for (; entry >= 0 && entry < p_.n_entries && bucket_of(p_.keys[entry]) == bucket; ++entry)
      if (p_.keys[entry] == key) return entry;
    return -1;
  }

  // factors[corner] = weight times the interpolation weight of each corner, row-major.
  void interpolate(int64_t location, Real weight) {
    Real* const factors = factors_.get();
    const Real* const fractions = &fractions_[location * p_.n_axes];
    factors[0] = weight;
    int64_t n = 1;
    for (int64_t axis = p_.n_axes - 1; axis >= 0; --axis, n *= 2)
      for (int64_t corner = 0; corner < n; ++corner) {
        factors[n + corner] = factors[corner] * fractions[axis];
        factors[corner] -= factors[n + corner];
      }
  }

  // The derivative of the interpolated dots by the fraction along an axis.
  Real slope(int64_t location, int64_t axis) const {
    const Real* const fractions = &fractions_[location * p_.n_axes];
    Real sum = 0;
    for (int64_t corner = 0; corner < n_corners_; ++corner) {
      Real factor = dots_[corner];
      for (int64_t other = 0; other < p_.n_axes; ++other) {
        const bool upper = corner >> (p_.n_axes - 1 - other) & 1;
        if (other == axis) factor = upper ? factor : -factor;
        else factor *= upper ? fractions[other] : 1 - fractions[other];
      }
      sum += factor;
    }
    return sum;
  }

  // to += factor * from, over channels.
  VICINAL_INLINE void add(Real* __restrict to, Real factor, const Real* __restrict from) const {
    for (int64_t c = 0, width = p_.width; c < width; ++c) to[c] += factor * from[c];
  }

  VICINAL_INLINE Real dot(const Real* a, const Real* b) const {
    V sums{};
    int64_t c = 0;
    for (; c + n_lanes<Real> <= p_.width; c += n_lanes<Real>) sums += load(a + c) * load(b + c);
    Real sum = 0;
    for (int lane = 0; lane < n_lanes<Real>; ++lane) sum += sums[lane];
    for (; c < p_.width; ++c) sum += a[c] * b[c];
    return sum;
  }
  static VICINAL_INLINE V load(const Real* from) {
    typedef Real Unaligned
        __attribute__((vector_size(VICINAL_BYTES), aligned(sizeof(Real)), may_alias));
    return V(*reinterpret_cast<const Unaligned*>(from));
  }

  const SamplingParams& p_;
  const int64_t n_corners_, n_locations_;  // 2^P; L * K
  // Of the locations of the current query and head:
  Buffer<Real> fractions_;          // [L * K, P], their distances from the first corner
  Buffer<int64_t> keys_, entries_;  // [L * K]
  Buffer<int64_t> rows_;            // [L * K, 2^P], rows of the table, or -1 for zeros
  // Of the current location:
  Buffer<Real> factors_, dots_;  // [2^P]
};

template <typename Real, typename Place>
void sample_with(const SamplingParams& p, WorkQueue& queue, bool forward) {
  SamplingKernel<Real, Place> kernel(p);
  for (int64_t chunk = queue.take(); chunk < queue.n_chunks; chunk = queue.take())
    for (int64_t unit = queue.begin(chunk); unit < queue.end(chunk); ++unit) {
      if (forward)
        for (int64_t head = 0; head < p.n_heads; ++head) kernel.forward(unit, head);
      else
        for (int64_t query = 0; query < p.n_queries; ++query) kernel.backward(query, unit);
    }
}

// Entry point. Every thread calls it with the same queue: of queries (forward), or of heads. One
// thread adds up the gradients of all rows of a head, in the order of queries, so the result does
// not depend on the number of threads.
inline void sample(const SamplingParams& p, WorkQueue& queue, bool forward) {
  const auto with_place = [&](auto real) {
    using Real = decltype(real);
    if (p.place_dtype == Dtype::float64) sample_with<Real, double>(p, queue, forward);
    else sample_with<Real, float>(p, queue, forward);
  };
  if (p.dtype == Dtype::float64) with_place(double());
  else with_place(float());
}

}  // namespace vicinal::VICINAL_ISA
