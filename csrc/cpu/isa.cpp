// Chooses the instruction set, once per process.
#include <stdlib.h>
#include <string.h>

#include "cpu/kernels.h"

namespace dak {
namespace {

#define DAK_TABLE(isa)        \
  [] {                        \
    Kernels table{};          \
    isa::fill_logp(table);    \
    isa::fill_kl(table);      \
    isa::fill_kl_grad(table); \
    isa::fill_stats(table);   \
    return table;             \
  }()

#ifndef DAK_ONLY_PORTABLE
enum Level { portable_level, avx2_level, avx512_level };

Level best_level() {
  __builtin_cpu_init();
  auto has = [](bool x) { return x; };
  bool avx2 = has(__builtin_cpu_supports("avx2")) && has(__builtin_cpu_supports("fma")) &&
              has(__builtin_cpu_supports("f16c"));
  bool avx512 = avx2 && has(__builtin_cpu_supports("avx512f")) &&
                has(__builtin_cpu_supports("avx512bw")) &&
                has(__builtin_cpu_supports("avx512dq")) && has(__builtin_cpu_supports("avx512vl"));
  return avx512 ? avx512_level : avx2 ? avx2_level : portable_level;
}

// ATEN_CPU_CAPABILITY speaks torch's language; an unknown value, or one beyond this machine, is
// passed over.
Level level() {
  Level best = best_level();
  const char* asked = getenv("DEEPALIGN_CPU_ISA");
  if (!asked || !*asked) asked = getenv("ATEN_CPU_CAPABILITY");
  if (!asked) return best;
  bool lowest = !strcmp(asked, "portable") || !strcmp(asked, "default");
  Level wanted = lowest ? portable_level : !strcmp(asked, "avx2") ? avx2_level : avx512_level;
  return wanted < best ? wanted : best;
}
#endif

Kernels choose() {
#ifndef DAK_ONLY_PORTABLE
  switch (level()) {
    case avx512_level:
      return DAK_TABLE(avx512);
    case avx2_level:
      return DAK_TABLE(avx2);
    default:
      break;
  }
#endif
  return DAK_TABLE(portable);
}

}  // namespace

bool runs_avx512() {
#ifndef DAK_ONLY_PORTABLE
  return level() == avx512_level;
#else
  return false;
#endif
}

const Kernels& kernels() {
  static const Kernels table = choose();
  return table;
}

}  // namespace dak
