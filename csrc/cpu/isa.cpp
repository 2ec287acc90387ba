// Chooses the instruction set: once per process, unless a test asks for another one.
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/rows/kernels.h"
#include "ops.h"

namespace dak {
namespace {

#define DAK_TABLE(isa)                   \
  [] {                                   \
    Kernels table{};                     \
    isa::fill_token_logp(table);         \
    isa::fill_token_logp_grad(table);    \
    isa::fill_token_entropy(table);      \
    isa::fill_token_entropy_grad(table); \
    isa::fill_token_kl(table);           \
    isa::fill_token_kl_grad(table);      \
    isa::fill_token_stats(table);        \
    isa::fill_scale_grad(table);         \
    isa::fill_tiles(table);              \
    return table;                        \
  }()

enum Level : int64_t { portable_level, avx2_level, avx512_level };

#ifdef DAK_ONLY_PORTABLE
Level best_level() { return portable_level; }
const Kernels& table_of(int64_t) {
  static const Kernels table = DAK_TABLE(portable);
  return table;
}
#else
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
const Kernels& table_of(int64_t level) {
  static const Kernels tables[] = {DAK_TABLE(portable), DAK_TABLE(avx2), DAK_TABLE(avx512)};
  return tables[level];
}
#endif

// ATEN_CPU_CAPABILITY speaks torch's language; an unknown value, or one beyond this machine, is
// passed over.
Level first_level() {
  Level best = best_level();
  const char* asked = std::getenv("DEEPALIGN_CPU_ISA");
  if (!asked || !*asked) asked = std::getenv("ATEN_CPU_CAPABILITY");
  if (!asked) return best;
  bool lowest = !std::strcmp(asked, "portable") || !std::strcmp(asked, "default");
  Level wanted = lowest ? portable_level : !std::strcmp(asked, "avx2") ? avx2_level : avx512_level;
  return wanted < best ? wanted : best;
}

std::atomic<int64_t>& current() {
  static std::atomic<int64_t> level{first_level()};
  return level;
}

}  // namespace

bool runs_avx2() { return current().load(std::memory_order_relaxed) >= avx2_level; }

bool runs_avx512() { return current().load(std::memory_order_relaxed) == avx512_level; }

const Kernels& kernels() { return table_of(current().load(std::memory_order_relaxed)); }

int64_t use_isa(int64_t level) {
  if (level < 0) return current().load();
  int64_t best = best_level();
  STD_TORCH_CHECK(level <= best, "level: expected at most ", best, " on this CPU, got ", level);
  return current().exchange(level);
}

}  // namespace dak
