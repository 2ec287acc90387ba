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

}  // namespace

void fill_kl(Kernels& table) { table.kl = kl; }

}  // namespace dak::DAK_ISA
