#pragma once

#include <cstddef>

namespace dijiang::cpu {
// At least `bytes` bytes aligned for any vector; the calling thread's own, valid until its next
// call.
void* thread_workspace(size_t bytes);
}  // namespace dijiang::cpu
