#include "cpu/cpu_level.h"

namespace dijiang::cpu {

int cpu_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const int level = __builtin_cpu_supports("x86-64-v4")   ? 4
                           : __builtin_cpu_supports("x86-64-v3") ? 3
                                                                 : 1;
  return level;
#else
  return 1;
#endif
}

}  // namespace dijiang::cpu
