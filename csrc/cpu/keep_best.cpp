#include "cpu/keep_best.h"

#include <algorithm>
#include <limits>

namespace dijiang::cpu {

void keep_best(const double* scores, int64_t n, int64_t wanted, int64_t* order, bool* kept) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!kept[i]) order[count++] = i;
  }
  const auto score = [&](int64_t i) {
    return scores[i] == scores[i] ? scores[i] : -std::numeric_limits<double>::infinity();
  };
  const auto better = [&](int64_t i, int64_t j) {
    const double x = score(i), y = score(j);
    return x > y || (x == y && i < j);
  };
  wanted = std::min(wanted, count);
  if (wanted < count) std::nth_element(order, order + wanted, order + count, better);
  for (int64_t i = 0; i < wanted; ++i) kept[order[i]] = true;
}

}  // namespace dijiang::cpu
