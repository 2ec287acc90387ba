// Divergence of one row between two models: one sweep for the KLs, two for Jensen-Shannon.
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

// KL to the last bit as the gradient sweep meets it: the mean log-ratio from the anchors, rounded, through the
// same fma. With |logits| of 200 a correctly rounded KL would leave a gradient of 1e-5 where it is 0.
float center_of(const PairSums<Want::kl>& s, float value, double inverse) {
  if (!(value - value == 0.0f)) return value;
  Anchor x(s.x.norm(inverse), inverse), y(s.y.norm(inverse), inverse);
  double moved = (double(s.x.from()) - x.shift) - (double(s.y.from()) - y.shift);
  float ratio = float(s.cross_x / s.x.sum + moved), log_sums = float(x.log_sum - y.log_sum);
  return first_of(fma(set(ratio), set(float(inverse)), set(0.0f) - set(log_sums)));
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
    if (own_policy) return {x, y, value, center_of(s, value, score.inverse)};
    return {y, x, value, 0.0f};
  });
}

}  // namespace

void fill_kl(Kernels& table) { table.kl = kl; }

}  // namespace dak::DAK_ISA
