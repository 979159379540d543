// The softmax of one query over its neighbors, block by block, for one instruction set: see
// vectors.h.

namespace vicinal::VICINAL_ISA {

constexpr int kBlock = 256;  // neighbors whose logits are held at a time

template <typename L>
class Softmax {
  using Real = typename L::Real;
  using V = Vector<Real>;
  using B = Bits<Real>;

 public:
  void set(const Dropout& dropout) { dropout_ = dropout; }

  // Of a block, in packed lanes: logits, then what they turn into; and in the backward pass the
  // products of values with the output's gradient.
  V logits[kBlock / L::kSpan], products[kBlock / L::kSpan];

  // Begins anew, for some heads of a query.
  void begin(int64_t query, int64_t head) {
    top_ = V{} - std::numeric_limits<Real>::infinity();
    total_ = V{};
    set_dropout(query, head);
  }

  // Begins the backward pass, by what is known of the whole: the log-sum-exp, and
  // delta = out . grad_out - grad_lse.
  void resume(int64_t query, int64_t head, V lse, V delta) {
    top_ = lse == V{} - std::numeric_limits<Real>::infinity() ? V{} : lse;
    delta_ = delta;
    set_dropout(query, head);
  }

  // Turns the logits of `count` neighbors, of which the first `seen` are real, into weights.
  // Returns by what the sums over the blocks before shrink. column_of(u) numbers them for dropout.
  template <typename Column>
  V weigh(int64_t seen, int64_t count, const Column& column_of) {
    const V lowest = V{} - std::numeric_limits<Real>::infinity();
    const int64_t vectors = count / L::kSpan;
    hide(seen, vectors);
    V top = top_;
    for (int64_t b = 0; b < vectors; ++b) top = larger(logits[b], top);
    top = fold<L>(top, larger);
    const V base = top == lowest ? V{} : top;
    const V shrink = exponential<Real>(top_ - base);
    top_ = top;
    total_ *= shrink;
    for (int64_t b = 0; b < vectors; ++b) {
      logits[b] = exponential<Real>(logits[b] - base);
      total_ += logits[b];
    }
    if (dropout_.active)
      for (int64_t b = 0; b < vectors; ++b) logits[b] *= kept(b, column_of);
    return shrink;
  }

  // From logits and products: the gradients of the logits, in place of them, and the weights by
  // which values entered the output, in place of the products.
  template <typename Column>
  void differentiate(int64_t seen, int64_t count, const Column& column_of) {
    const int64_t vectors = count / L::kSpan;
    hide(seen, vectors);
    for (int64_t b = 0; b < vectors; ++b) {
      const V probability = exponential<Real>(logits[b] - top_);
      const V keep = dropout_.active ? kept(b, column_of) : V{} + Real(1);
      logits[b] = probability * (keep * products[b] - delta_);
      products[b] = probability * keep;
    }
  }

  // What the sums of all blocks are to be divided by, and the log-sum-exp.
  V total() const { return fold<L>(total_, plus); }
  V lse(V total) const { return top_ + logarithm<Real>(total); }

 private:
  static constexpr auto larger = [](V a, V b) { return a > b ? a : b; };

  // What only fills up the block weighs nothing.
  void hide(int64_t seen, int64_t vectors) {
    for (int64_t b = seen / L::kSpan; b < vectors; ++b)
      logits[b] = first_keys<L>(seen - b * L::kSpan)
                      ? logits[b]
                      : V{} - std::numeric_limits<Real>::infinity();
  }

  // Dropout's key of (head, query), to be combined with a column's number.
  void set_dropout(int64_t query, int64_t head) {
    if (!dropout_.active) return;
    B heads;
    for (int lane = 0; lane < L::kLanes; ++lane) heads[lane] = uint32_t(head + lane % L::kHeads);
    key_ = mix(mix(dropout_.key ^ heads) ^ uint32_t(query));
  }

  template <typename Column>
  V kept(int64_t b, const Column& column_of) const {
    B columns;
    for (int lane = 0; lane < L::kLanes; ++lane)
      columns[lane] = uint32_t(column_of(b * L::kSpan + lane / L::kHeads));
    return mix(key_ ^ columns) >= dropout_.threshold ? V{} + Real(dropout_.keep_scale) : V{};
  }

  Dropout dropout_;
  V top_, total_, delta_;
  B key_;
};

}  // namespace vicinal::VICINAL_ISA
