// token_stats on CUDA tensors: arguments in, one launch, nothing waits.
#include "cuda/tensors.h"

namespace dak {

using gpu::Call;
using gpu::f32;

Tensor token_stats_fwd(
    Tensor policy, Tensor ref, MaybeTensor target, MaybeTensor valid, int64_t ignore_index,
    double js_beta, double temperature, double softcap) {
  Call call("token_stats_fwd", "policy", policy, temperature, softcap);
  Tensor stats = call.new_f32({8, call.rows().rows});
  gpu::StatsArgs args{};
  args.r = call.rows();
  args.policy = call.logits();
  args.ref = call.matrix("ref", ref);
  if (target) args.target = call.targets(*target);
  args.valid = call.valid(valid);
  args.ignore_index = ignore_index;
  args.with_js = js_beta > 0;
  args.mix = gpu::mixture_of(js_beta);
  args.stats = f32(stats);
  call.run(args);
  return stats;
}

}  // namespace dak
