// token_logp of one row, log-softmax at the target: one sweep.
#include "cpu/rows/kernels.h"
#include "cpu/rows/softmax.h"

namespace dak::DAK_ISA {
namespace {

LogpRow logp(Row x, int64_t y, Score options) {
  return with_type(x, options, [&](auto* p, auto score) -> LogpRow {
    RunningSoftmax softmax = sum_row(score, p, x.columns);
    LogpRow out{softmax.norm(score.inverse), 0.0};
    if (y >= 0) out.logp = softmax.log_prob(score_at(score, p, y), score.inverse);
    return out;
  });
}

}  // namespace

void fill_token_logp(Kernels& table) { table.logp = logp; }

}  // namespace dak::DAK_ISA
