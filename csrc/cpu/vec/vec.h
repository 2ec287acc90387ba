// One vector of floats, F, with the operations that the row kernels need, per instruction set.
//
// Every rows/*.cpp is compiled once per instruction set into its own namespace, so nothing here
// may leave it: no inline function of the standard library, which the linker would merge across
// them. `load2` fills two vectors from 2 * F::lanes columns in whatever order is cheapest (bf16:
// even columns, odd columns); `store2` undoes it. Sums and maxima do not care, gradients use
// both.
#pragma once

#include <cstdint>
#include <cstring>

// a * b - c must not turn into an fma behind our back: equal logits give exactly 0 because both
// models go through the same roundings.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

#ifndef DAK_ISA
#define DAK_ISA portable
#endif
#define DAK_LEVEL_portable 0
#define DAK_LEVEL_avx2 1
#define DAK_LEVEL_avx512 2
#define DAK_CAT2(a, b) a##b
#define DAK_CAT(a, b) DAK_CAT2(a, b)
#define DAK_LEVEL DAK_CAT(DAK_LEVEL_, DAK_ISA)
#define DAK_INLINE inline __attribute__((always_inline))

namespace dak::DAK_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class A, class B>
inline constexpr bool same = false;
template <class A>
inline constexpr bool same<A, A> = true;

// The type that a pointer to const points at: plain<decltype(*p)>.
template <class A>
struct Plain {
  using type = A;
};
template <class A>
struct Plain<A&> : Plain<A> {};
template <class A>
struct Plain<const A> : Plain<A> {};
template <class A>
using plain = typename Plain<A>::type;

inline constexpr float inf = __builtin_inff();

}  // namespace dak::DAK_ISA

#if DAK_LEVEL == 2
#include "cpu/vec/vec_avx512.h"
#elif DAK_LEVEL == 1
#include "cpu/vec/vec_avx2.h"
#else
#include "cpu/vec/vec_portable.h"
#endif

#include "cpu/vec/vec_math.h"
