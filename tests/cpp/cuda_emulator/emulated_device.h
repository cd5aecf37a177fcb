// The device that the emulator plays.
#pragma once

#include "emulated_attention.h"

namespace emulated {

// Of the device played: how many multiprocessors (many: sequences are split), and shared memory.
struct Device {
  explicit Device(int multiprocessors, int shared_bytes = 227 * 1024)
      : before(cuda_emulator::device()) {
    cuda_emulator::device() = {multiprocessors, shared_bytes};
    forget_kernels();
  }
  ~Device() { cuda_emulator::device() = before; }
  cuda_emulator::Device before;
};
constexpr int kFew = 1, kMany = 1000;

}  // namespace emulated
