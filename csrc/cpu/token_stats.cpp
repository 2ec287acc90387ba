#include "cpu/tensors.h"

namespace dak {

Tensor token_stats_fwd(
    Tensor policy, Tensor ref, MaybeTensor target, MaybeTensor valid, int64_t ignore_index,
    double js_beta, double temperature, double softcap) {
  Logits q("policy", policy), p("ref", ref);
  p.must_match("ref", q);
  Valid keep(valid, q.rows());
  std::optional<Targets> targets;
  if (target) targets.emplace(*target, q, ignore_index);
  Score score = score_of(temperature, softcap);
  int64_t n = q.rows();
  Tensor out = new_f32(policy, {8, n});
  float* to = f32(out);
  const Kernels& k = kernels();
  for_rows(n, q.columns(), [&](int64_t r) {
    auto kind = targets ? targets->kind(r) : Targets::outside;
    StatsRow s{};
    if (keep[r] && kind != Targets::ignored) {
      int64_t y = kind == Targets::inside ? (*targets)[r] : -1;
      s = k.stats(q.row(r), p.row(r), y, js_beta, score);
      if (targets && y < 0) s.logp = s.ref_logp = __builtin_nanf("");
    }
    const float fields[8] = {s.logp,  s.ref_logp,    s.kl_policy_ref, s.kl_ref_policy, s.js,
                             s.entropy, s.ref_entropy, s.top1_agree};
    for (int64_t f = 0; f < 8; f++) to[f * n + r] = fields[f];
  });
  return out;
}

}  // namespace dak
