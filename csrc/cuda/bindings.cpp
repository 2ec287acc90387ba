// Registers the CUDA functions against the schemas that the CPU library defines.
#include "schemas.h"

STABLE_TORCH_LIBRARY_IMPL(deepalign_native, CUDA, m) { dak::implement(m); }
