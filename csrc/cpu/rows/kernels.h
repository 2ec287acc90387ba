// Every file of csrc/cpu/{rows,panels} fills its part of the table of its instruction set.
#pragma once

#include "cpu/rows/rows.h"

#define DAK_DECLARE(isa)                  \
  namespace dak::isa {                    \
  void fill_token_logp(Kernels&);         \
  void fill_token_logp_grad(Kernels&);    \
  void fill_token_entropy(Kernels&);      \
  void fill_token_entropy_grad(Kernels&); \
  void fill_token_kl(Kernels&);           \
  void fill_token_kl_grad(Kernels&);      \
  void fill_token_stats(Kernels&);        \
  void fill_scale_grad(Kernels&);         \
  void fill_tiles(Kernels&);              \
  }

DAK_DECLARE(portable)
#ifndef DAK_ONLY_PORTABLE
DAK_DECLARE(avx2)
DAK_DECLARE(avx512)
#endif
