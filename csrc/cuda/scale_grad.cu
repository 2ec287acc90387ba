// scale_grad: a gradient times a number on the device, in place.
#include "cuda/piece.cuh"

namespace dak::gpu {
namespace {

// The factor is read here, so the host never waits for it; where it is 1 nothing is moved.
template <class T>
__global__ void __launch_bounds__(threads) scale_rows(const __grid_constant__ ScaleArgs a) {
  float factor = *a.factor;
  if (factor == 1.0f) return;
  Piece<T> part(a.r, a.grad);
  uint4 chunks[each];
  part.load(part.at(a.grad), chunks);
  OutRow<T> out = part.out(a.grad);
#pragma unroll
  for (int n = 0; n < each; n++) {
    float g[vec<T>];
    unpack<T>(chunks[n], g);
#pragma unroll
    for (int k = 0; k < vec<T>; k++) g[k] *= factor;
    out.store(part.column(n), g);
  }
}

}  // namespace

cudaError_t run(const ScaleArgs& args, cudaStream_t stream) {
  Type type = args.grad.type;
  return with_type<float, bf16, f16>(type, args.r.score, [&](auto of, auto) {
    return launch_pieces<ScaleArgs>(scale_rows<decltype(of)>, args, type, stream);
  });
}

}  // namespace dak::gpu
