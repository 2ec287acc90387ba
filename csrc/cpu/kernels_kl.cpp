// Divergence of one row between two models: one sweep for the KLs, two for Jensen-Shannon.
#include <math.h>

#include "cpu/js_row.h"
#include "cpu/kernels.h"
#include "cpu/pair.h"

namespace dak::DAK_ISA {
namespace {

template <class T, bool Cap>
KlRow js_of(const Scorer<Cap>& score, const T* q, const T* p, int64_t n, double js_beta) {
  Model mp = sum_row(score, p, n), mq = sum_row(score, q, n);
  JsSums sums = js_row(score, q, p, n, js_beta, mq, mp);
  float value = float(js_beta * sums.p + (1.0 - js_beta) * sums.q);
  return {mq.norm(score.inverse), mp.norm(score.inverse), value, float(sums.q)};
}

// KL for the gradient sweep, which subtracts it from rounded log-ratios: it carries the rounding of
// the likeliest column's. With |logits| of 200 that is 1e-4, times nearly all of q, where the
// gradient is 0.
template <class T, bool Cap>
float center_of(
    const Scorer<Cap>& score, const T* q, const T* p, int64_t n, const PairSums<Want::kl>& s) {
  double value = s.kl_x(score.inverse);
  // Below half of q, and where there is no finite KL, it does not matter.
  if (!(s.x.sum < 2.0) || !(value - value == 0.0)) return float(value);
  int64_t column = top_column(score, q, n, s.x);
  float zq = score_at(score, q, column), zp = score_at(score, p, column);
  Anchor anchor_q(s.x.norm(score.inverse), score.inverse);
  Anchor anchor_p(s.y.norm(score.inverse), score.inverse);
  LogRatio log_ratio(anchor_q, anchor_p, score.inverse);
  double apart = (double(zq) - double(zp)) * score.inverse;
  double others = value - (apart - s.x.lse(score.inverse) + s.y.lse(score.inverse));
  double rounding = 1.2e-7 * fabs(apart - s.between() * score.inverse);  // of this column's term
  if (fabs(others) < rounding) others = 0.0;
  return float(double(first_of(log_ratio(set(zq), set(zp)))) + others);
}

KlRow kl(Row policy, Row ref, int64_t direction, double js_beta, Score options) {
  return with_type(policy, options, [&](auto* q, auto score) -> KlRow {
    auto* p = static_cast<decltype(q)>(ref.data);
    int64_t n = policy.columns;
    if (direction == js) return js_of(score, q, p, n, js_beta);
    bool own_policy = direction == policy_ref;
    auto s = sum_pair<Want::kl>(score, own_policy ? q : p, own_policy ? p : q, n);
    Norm x = s.x.norm(score.inverse), y = s.y.norm(score.inverse);
    float value = float(s.kl_x(score.inverse));
    if (own_policy) return {x, y, value, center_of(score, q, p, n, s)};
    return {y, x, value, 0.0f};
  });
}

}  // namespace

void fill_kl(Kernels& table) { table.kl = kl; }

}  // namespace dak::DAK_ISA
