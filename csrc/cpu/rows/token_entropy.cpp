// token_entropy of one row: one sweep.
#include "cpu/rows/kernels.h"
#include "cpu/rows/softmax.h"

namespace dak::DAK_ISA {
namespace {

EntropyRow entropy(Row x, Score options) {
  return with_type(x, options, [&](auto* p, auto score) -> EntropyRow {
    RunningSoftmax softmax = sum_row<true>(score, p, x.columns);
    return {softmax.norm(score.inverse), float(softmax.entropy())};
  });
}

}  // namespace

void fill_token_entropy(Kernels& table) { table.entropy = entropy; }

}  // namespace dak::DAK_ISA
