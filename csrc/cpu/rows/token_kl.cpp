// token_kl of one row: one sweep for the KLs, two for Jensen-Shannon.
#include "cpu/rows/kernels.h"
#include "cpu/rows/mixture.h"
#include "cpu/rows/pair.h"

namespace dak::DAK_ISA {
namespace {

template <class T, bool Cap>
KlRow js_of(const Scorer<Cap>& score, const T* q, const T* p, int64_t n, double js_beta) {
  RunningSoftmax mp = sum_row(score, p, n), mq = sum_row(score, q, n);
  LogProb log_q = log_prob_of(mq, score.inverse), log_p = log_prob_of(mp, score.inverse);
  JsSums sums = js_row(score, q, p, n, js_beta, log_q, log_p);
  float value = float(js_beta * sums.p + (1.0 - js_beta) * sums.q);
  return {mq.norm(score.inverse), mp.norm(score.inverse), value, float(sums.q)};
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
    if (own_policy) return {x, y, value, value};
    return {y, x, value, 0.0f};
  });
}

LogProb log_prob_of(Norm norm, double inverse) {
  Anchor at(norm, inverse);
  return {set(float(inverse)), set(at.shift), set(float(at.log_sum))};
}

JsParts js_parts(Row policy, Row ref, Norm norm_q, Norm norm_p, double js_beta, Score options) {
  return with_type(policy, options, [&](auto* q, auto score) -> JsParts {
    auto* p = static_cast<decltype(q)>(ref.data);
    LogProb log_q = log_prob_of(norm_q, score.inverse), log_p = log_prob_of(norm_p, score.inverse);
    JsSums sums = js_row(score, q, p, policy.columns, js_beta, log_q, log_p);
    return {float(sums.q), float(sums.p)};
  });
}

}  // namespace

void fill_token_kl(Kernels& table) {
  table.kl = kl;
  table.js_parts = js_parts;
}

}  // namespace dak::DAK_ISA
