#pragma once

#include <cstdint>

namespace dijiang::cpu {

// Marks the `wanted` largest of n scores that are not marked yet; of equal ones the first. NaN is
// below every number. order: scratch of n.
void keep_best(const double* scores, int64_t n, int64_t wanted, int64_t* order, bool* kept);

}  // namespace dijiang::cpu
