// Registers namespace deepalign_native: the schemas, and the CPU's functions.
#include "schemas.h"

// Another name lets two builds of this library live in one process (hub/make.py).
#ifndef DAK_NAMESPACE
#define DAK_NAMESPACE deepalign_native
#endif
#define DAK_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define DAK_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

DAK_LIBRARY(DAK_NAMESPACE, m) { dak::define(m); }

DAK_LIBRARY_IMPL(DAK_NAMESPACE, CPU, m) {
  dak::implement(m);
  m.impl("token_entropy_fwd", TORCH_BOX(&dak::token_entropy_fwd));
  m.impl("token_entropy_bwd", TORCH_BOX(&dak::token_entropy_bwd));
  m.impl("large_pages", TORCH_BOX(&dak::large_pages));
  m.impl("mm", TORCH_BOX(&dak::mm));
}

DAK_LIBRARY_IMPL(DAK_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("use_isa", TORCH_BOX(&dak::use_isa));
  m.impl("has_gemm", TORCH_BOX(&dak::has_gemm));
}
