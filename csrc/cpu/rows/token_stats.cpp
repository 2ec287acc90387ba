// token_stats of one row: one sweep for everything but Jensen-Shannon, which takes a second one.
#include "cpu/rows/kernels.h"
#include "cpu/rows/mixture.h"
#include "cpu/rows/pair.h"

namespace dak::DAK_ISA {
namespace {

StatsRow stats(Row policy, Row ref, int64_t y, double js_beta, Score options) {
  return with_type(policy, options, [&](auto* q, auto score) -> StatsRow {
    auto* p = static_cast<decltype(q)>(ref.data);
    int64_t n = policy.columns;
    auto s = sum_pair<Want::stats>(score, q, p, n);
    StatsRow out{};
    if (y >= 0) {
      out.logp = float(s.x.log_prob(score_at(score, q, y), score.inverse));
      out.ref_logp = float(s.y.log_prob(score_at(score, p, y), score.inverse));
    }
    out.kl_policy_ref = float(s.kl_x(score.inverse));
    out.kl_ref_policy = float(s.kl_y(score.inverse));
    out.entropy = float(s.entropy_x(score.inverse));
    out.ref_entropy = float(s.entropy_y(score.inverse));
    if (js_beta > 0) {
      LogProb log_q = log_prob_of(s.x, score.inverse), log_p = log_prob_of(s.y, score.inverse);
      JsSums sums = js_row(score, q, p, n, js_beta, log_q, log_p);
      out.js = float(js_beta * sums.p + (1.0 - js_beta) * sums.q);
    }
    out.top1_agree = top_column(score, q, n, s.x) == top_column(score, p, n, s.y) ? 1.0f : 0.0f;
    return out;
  });
}

}  // namespace

void fill_token_stats(Kernels& table) { table.stats = stats; }

}  // namespace dak::DAK_ISA
