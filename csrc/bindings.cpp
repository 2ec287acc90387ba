// Registers namespace deepalign_native: the schemas, and the CPU's functions.
#include "schemas.h"

STABLE_TORCH_LIBRARY(deepalign_native, m) { dak::define(m); }

STABLE_TORCH_LIBRARY_IMPL(deepalign_native, CPU, m) { dak::implement(m); }
