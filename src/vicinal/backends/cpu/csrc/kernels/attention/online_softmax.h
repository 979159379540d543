// The online softmax of FlashAttention-2, for one query and kHeads heads, over blocks of keys.
// See kernels.h for how it is included.

namespace vicinal::VICINAL_ISA {

constexpr int kBlockKeys = 256;  // keys per block

template <typename L>
class OnlineSoftmax {
  using Real = typename L::Real;
  using V = Vector<Real>;
  using W = Words<Real>;

 public:
  void set_dropout(const DropoutParams& dropout) {
    dropout_ = dropout;
    seed_key_ = hash32(hash32(uint32_t(dropout.seed)) ^ uint32_t(dropout.seed >> 32));
  }

  // One block: [kBlockKeys / kLanesPerHead], vectors of [kLanesPerHead keys, kHeads heads], and
  // room for dot products past its last key. `logits` holds logits, then probabilities (forward) or
  // grad_logits (backward). `grad_probs` (backward only) holds dot(v, grad_out), then probabilities
  // after dropout.
  V logits[(kBlockKeys + kKeyUnroll<L>) / L::kLanesPerHead];
  V grad_probs[(kBlockKeys + kKeyUnroll<L>) / L::kLanesPerHead];

  // Starts the forward pass of a query and the heads from `head` on.
  void begin_forward(int64_t query, int64_t head) {
    row_max_ = lowest();
    row_sum_ = V{};
    set_dropout_key(query, head);
  }

  // Starts the backward pass, from the log-sum-exp of the forward pass and
  // delta = dot(out, grad_out) - grad_lse, both broadcast per head.
  void begin_backward(int64_t query, int64_t head, V lse, V delta) {
    lse_ = lse == lowest() ? V{} : lse;
    delta_ = delta;
    set_dropout_key(query, head);
  }

  // Forward pass of a block of `count` keys. Replaces logits by unnormalized probabilities, after
  // dropout; the rest of the last vector is zero. Returns the factor exp(old row_max - new row_max)
  // by which the caller rescales its accumulator. column_of(key) is the key's column number for
  // dropout.
  template <typename ColumnOf>
  V update(int64_t count, const ColumnOf& column_of) {
    const int64_t vectors = mask_padding(count);
    V row_max = row_max_;
    for (int64_t b = 0; b < vectors; ++b) row_max = maximum(logits[b], row_max);
    row_max = reduce_lanes<L>(row_max, maximum);
    const V base = row_max == lowest() ? V{} : row_max;
    const V rescale = exponential<Real>(row_max_ - base);
    row_max_ = row_max;
    V row_sum = row_sum_ * rescale;
    for (int64_t b = 0; b < vectors; ++b) {
      const V prob = exponential<Real>(logits[b] - base);
      logits[b] = prob;
      row_sum += prob;
    }
    row_sum_ = row_sum;
    if (dropout_.active)
      for (int64_t b = 0; b < vectors; ++b) logits[b] *= dropout_factor(b, column_of);
    return rescale;
  }

  // Backward pass of a block. Replaces logits by grad_logits, and grad_probs by the normalized
  // probabilities after dropout.
  template <typename ColumnOf>
  void backward(int64_t count, const ColumnOf& column_of) {
    const int64_t vectors = mask_padding(count);
    for (int64_t b = 0; b < vectors; ++b) {
      const V prob = exponential<Real>(logits[b] - lse_);
      const V factor = dropout_.active ? dropout_factor(b, column_of) : V{} + Real(1);
      logits[b] = prob * (factor * grad_probs[b] - delta_);
      grad_probs[b] = prob * factor;
    }
  }

  // After the last block of the forward pass, broadcast per head.
  V row_sum() const { return reduce_lanes<L>(row_sum_, plus); }
  V lse(V row_sum) const { return row_max_ + logarithm<Real>(row_sum); }

 private:
  static constexpr auto maximum = [](V a, V b) { return a > b ? a : b; };
  static V lowest() { return V{} - std::numeric_limits<Real>::infinity(); }

  // Masks what follows the last of `count` keys in its vector. Returns the number of vectors.
  int64_t mask_padding(int64_t count) {
    const int64_t full = count / L::kLanesPerHead, rest = count % L::kLanesPerHead;
    if (rest > 0) logits[full] = key_mask<L>(rest) ? logits[full] : lowest();
    return n_vectors<L>(count);
  }

  // The hash of (seed, head, id of the query), which dropout_factor combines with the column.
  void set_dropout_key(int64_t query, int64_t head) {
    if (!dropout_.active) return;
    W heads{};
    for (int lane = 0; lane < L::kLanes; ++lane) heads[lane] = uint32_t(head + lane % L::kHeads);
    dropout_key_ = hash32(hash32(seed_key_ ^ heads) ^ dropout_.query_id(query));
  }

  // Zero for dropped probabilities, 1 / (1 - dropout_p) for others. Stateless: the backward pass
  // recomputes it.
  template <typename ColumnOf>
  V dropout_factor(int64_t b, const ColumnOf& column_of) const {
    W columns{};
    for (int lane = 0; lane < L::kLanes; ++lane)
      columns[lane] = uint32_t(column_of(b * L::kLanesPerHead + lane / L::kHeads));
    const auto keep = hash32(dropout_key_ ^ columns) >= dropout_.threshold;
    return keep ? V{} + Real(dropout_.keep_scale) : V{};
  }

  DropoutParams dropout_;
  uint32_t seed_key_ = 0;  // the hash of the seed
  V row_max_, row_sum_;  // forward; row_sum_ holds partial sums per lane
  V lse_, delta_;        // backward
  W dropout_key_;
};

}  // namespace vicinal::VICINAL_ISA
