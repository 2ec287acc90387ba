// Every file of csrc/cpu/rows fills its part of the table of its instruction set.
#pragma once

#include "cpu/rows/rows.h"

#define DAK_DECLARE(isa)         \
  namespace dak::isa {           \
  void fill_logp(Kernels&);      \
  void fill_kl(Kernels&);        \
  void fill_kl_grad(Kernels&);   \
  void fill_stats(Kernels&);     \
  }

DAK_DECLARE(portable)
#ifndef DAK_ONLY_PORTABLE
DAK_DECLARE(avx2)
DAK_DECLARE(avx512)
#endif
