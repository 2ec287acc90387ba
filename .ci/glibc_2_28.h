// Included into every source of a wheel that must load with glibc 2.28 and the libstdc++ of GCC 8,
// whatever is on the machine that builds it (GCC 12 and glibc 2.36 were tried): see .ci/wheel.
#include <cstddef>

// exp, exp2 and log got new versions in glibc 2.29. The old ones give the same values; they only go
// through a wrapper that sets errno.
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver exp2, exp2@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");

// Members of string streams that newer versions of libstdc++ export are compiled into our objects.
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0

// libstdc++ asks this variable of glibc 2.32 whether it may leave out atomic operations. Here: never.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
