#include "dijiang/core/dct.h"

#include "cpu/cpu_level.h"

namespace dijiang::cpu {

namespace baseline {
void dct(const DctParams& params, int64_t begin, int64_t end);
}
namespace avx2 {
void dct(const DctParams& params, int64_t begin, int64_t end);
}
namespace avx512 {
void dct(const DctParams& params, int64_t begin, int64_t end);
}

void dct(const DctParams& params, int64_t begin, int64_t end) {
  DIJIANG_DISPATCH(dct, params, begin, end);
}

}  // namespace dijiang::cpu
