// Registers namespace deepalign_native: the schemas, and the CPU's functions.
#include "schemas.h"

STABLE_TORCH_LIBRARY(deepalign_native, m) { dak::define(m); }

STABLE_TORCH_LIBRARY_IMPL(deepalign_native, CPU, m) {
  dak::implement(m);
  m.impl("large_pages", TORCH_BOX(&dak::large_pages));
  m.impl("mm", TORCH_BOX(&dak::mm));
}

STABLE_TORCH_LIBRARY_IMPL(deepalign_native, CompositeExplicitAutograd, m) {
  m.impl("use_isa", TORCH_BOX(&dak::use_isa));
  m.impl("has_gemm", TORCH_BOX(&dak::has_gemm));
}
