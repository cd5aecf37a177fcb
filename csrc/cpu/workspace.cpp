#include "cpu/workspace.h"

#include <memory>
#include <new>

namespace dijiang::cpu {
namespace {
constexpr std::align_val_t kAlignment{64};
struct Free {
  void operator()(void* p) const { ::operator delete(p, kAlignment); }
};
}  // namespace

void* thread_workspace(size_t bytes) {
  static thread_local std::unique_ptr<void, Free> storage;
  static thread_local size_t capacity = 0;
  if (bytes > capacity) {
    storage.reset();
    capacity = 0;
    storage.reset(::operator new(bytes, kAlignment));
    capacity = bytes;
  }
  return storage.get();
}

}  // namespace dijiang::cpu
