// scale_grad of one row: scaled in place.
#include "cpu/rows/kernels.h"
#include "cpu/rows/sweep.h"

namespace dak::DAK_ISA {
namespace {

template <class T>
struct Scaled {
  F by;
  template <bool Stream>
  DAK_INLINE void operator()(T* out, const T* p) const {
    F a, b;
    load2(p, a, b);
    store2<Stream, T>(out, a * by, b * by);
  }
};

void scale(Row x, float by) {
  with_type(x, Score{}, [&](auto* p, auto) {
    using T = plain<decltype(*p)>;
    map_row<false>(const_cast<T*>(p), x.columns, Scaled<T>{factor(by)}, p);
  });
}

}  // namespace

void fill_scale_grad(Kernels& table) { table.scale = scale; }

}  // namespace dak::DAK_ISA
