// One row through one kernel of csrc/cpu, for callgrind: instructions.py compiles and runs it.
//
//     instructions OP TYPE COLUMNS      OP as in `calls` below; TYPE f32, bf16 or f16
//
// Callgrind counts what happens inside `measured`, and prints it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/rows/kernels.h"

using namespace dak;

struct Problem {
  Row policy, ref;
  OutRow out;
  int64_t target;
  LogpRow own;
  KlRow kl;
};

static uint16_t half_of(float x, Type type) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (type == Type::bf16) return uint16_t(bits >> 16);
  uint32_t exponent = (bits >> 23) & 0xff;  // |x| is in [2^-14, 2^15) or 0
  if (exponent < 113) return uint16_t(bits >> 16 & 0x8000);
  return uint16_t((bits >> 16 & 0x8000) | (exponent - 112) << 10 | (bits >> 13 & 0x3ff));
}

// The same normal-looking numbers everywhere.
static void fill(char* at, int64_t n, Type type, uint32_t seed) {
  uint64_t state = seed;
  for (int64_t i = 0; i < n; i++) {
    float sum = -6;
    for (int k = 0; k < 12; k++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += float(state >> 40) / float(1 << 24);
    }
    uint16_t half = half_of(2 * sum, type);
    sum *= 2;
    type == Type::f32 ? memcpy(at + 4 * i, &sum, 4) : memcpy(at + 2 * i, &half, 2);
  }
}

static void token_logp_fwd(Problem& p) { kernels().logp(p.policy, p.target, {}); }
static void token_logp_bwd(Problem& p) {
  kernels().logp_grad(p.policy, p.target, {}, p.own.norm, 0.5, p.out);
}
template <Direction direction>
static void token_kl_fwd(Problem& p) {
  p.kl = kernels().kl(p.policy, p.ref, direction, 0.5, {});
}
template <Direction direction>
static void token_kl_bwd(Problem& p) {
  KlGrad g{p.kl.policy, p.kl.ref, 0.5f, p.kl.center, direction, 0.5};
  kernels().kl_grad(p.policy, p.ref, g, {}, p.out);
}
static void token_stats(Problem& p) { kernels().stats(p.policy, p.ref, p.target, 0.5, {}); }

struct Call {
  const char* name;
  void (*before)(Problem&);
  void (*run)(Problem&);
};
static const Call calls[] = {
    {"token_logp/fwd", nullptr, token_logp_fwd},
    {"token_logp/bwd", nullptr, token_logp_bwd},
    {"token_kl/policy_ref/fwd", nullptr, token_kl_fwd<policy_ref>},
    {"token_kl/policy_ref/bwd", token_kl_fwd<policy_ref>, token_kl_bwd<policy_ref>},
    {"token_kl/ref_policy/fwd", nullptr, token_kl_fwd<ref_policy>},
    {"token_kl/ref_policy/bwd", token_kl_fwd<ref_policy>, token_kl_bwd<ref_policy>},
    {"token_kl/js/fwd", nullptr, token_kl_fwd<js>},
    {"token_kl/js/bwd", token_kl_fwd<js>, token_kl_bwd<js>},
    {"token_stats/fwd", nullptr, token_stats},
};

extern "C" __attribute__((noinline)) void measured(const Call& call, Problem& p) { call.run(p); }

int main(int count, char** words) {
  if (count == 2 && !strcmp(words[1], "list")) {
    for (const Call& call : calls) puts(call.name);
    return 0;
  }
  if (count != 4) return 2;
  Type type = !strcmp(words[2], "f32")    ? Type::f32
              : !strcmp(words[2], "bf16") ? Type::bf16
                                          : Type::f16;
  int64_t n = atoll(words[3]), bytes = n * bytes_of(type);
  std::vector<char> x(bytes + 64), y(bytes + 64), z(bytes + 64);
  auto aligned = [](std::vector<char>& v) {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(v.data()) + 63) & ~uintptr_t(63));
  };
  fill(aligned(x), n, type, 1);
  fill(aligned(y), n, type, 2);
  Problem p{{aligned(x), n, type}, {aligned(y), n, type}, {aligned(z), type, false}, n / 3, {}, {}};
  p.own = kernels().logp(p.policy, p.target, {});
  for (const Call& call : calls) {
    if (strcmp(call.name, words[1])) continue;
    if (call.before) call.before(p);
    measured(call, p);
    return 0;
  }
  return 2;
}
