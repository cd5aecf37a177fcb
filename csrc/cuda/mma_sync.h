// The instructions of sm_80 that the fused kernels are made of, one function each: asynchronous
// copies, matrix fragments, products of 16-bit fragments, approximate powers. Under
// tests/cpp/cuda_emulator the same functions exist as warp collectives with the same layouts, so
// that the index arithmetic that runs on a GPU is what the tests run.
//
// Fragments of a warp, with g = lane / 4 and j = lane % 4; every register holds two neighbours:
//   A (16 x 16)  a[0] (g, 2j)  a[1] (g + 8, 2j)  a[2] (g, 2j + 8)  a[3] (g + 8, 2j + 8)
//   B (16 x 8)   b0 (2j, g)  b1 (2j + 8, g), two rows of one column
//   C (16 x 8)   c[0], c[1] (g, 2j)  c[2], c[3] (g + 8, 2j)
#pragma once

#include "cuda/device_math.h"

#ifdef DIJIANG_CUDA_EMULATION
#include "emulated_mma_sync.h"
#else

namespace dijiang::cuda {

// What older code cannot hold is never launched there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define DIJIANG_SM80(...)
#else
#define DIJIANG_SM80(...) __VA_ARGS__
#endif

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, both sides aligned to 16; zeros when not `inside`, and `from` is then not read.
__device__ inline void copy_async(void* to, const void* from, bool inside) {
  DIJIANG_SM80(
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                   "l"(from), "r"(inside ? 16 : 0)
                   : "memory");)
}
// Waits for all of the thread's copies; others see them after a barrier.
__device__ inline void wait_copies() {
  DIJIANG_SM80(asm volatile("cp.async.wait_all;" ::: "memory");)
}

// 8 bytes to memory where `inside`: a predicate, as a branch would cost more than the store.
__device__ inline void store_8(void* to, unsigned first, unsigned second, bool inside) {
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.s32 p, %3, 0;\n\t@p st.global.v2.b32 [%0], {%1, %2};\n\t}" ::
          "l"(to),
      "r"(first), "r"(second), "r"(int{inside})
      : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8. Register i of a
// lane is (g, 2j) of matrix i, transposed (2j, g).
__device__ inline void load_matrices(unsigned (&r)[4], const void* row) {
  DIJIANG_SM80(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                            : "r"(shared_address(row))
                            : "memory");)
}
__device__ inline void load_transposed(unsigned (&r)[4], const void* row) {
  DIJIANG_SM80(asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                            : "r"(shared_address(row))
                            : "memory");)
}

// c += a b, of fragments of T.
template <class T>
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                    unsigned b1);
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4],
                                                   unsigned b0, unsigned b1) {
  DIJIANG_SM80(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));)
}
template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                            unsigned b1) {
  DIJIANG_SM80(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));)
}

// Two floats rounded to T, the first in the low half.
template <class T>
__device__ inline unsigned pack(float first, float second);
template <>
__device__ inline unsigned pack<__nv_bfloat16>(float first, float second) {
  unsigned r = 0;
  DIJIANG_SM80(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));)
  return r;
}
template <>
__device__ inline unsigned pack<__half>(float first, float second) {
  unsigned r = 0;
  DIJIANG_SM80(asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));)
  return r;
}

// Within 2 units in the last place for arguments of moderate size.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 0 in the place of what is below the smallest normal number.
__device__ inline float multiply_flushed(float x, float y) {
  float z;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

}  // namespace dijiang::cuda

#undef DIJIANG_SM80
#endif

namespace dijiang::cuda {

// The two halves of a register as floats.
template <class T>
struct Pair {
  float first, second;
};
template <class T>
__device__ inline Pair<T> unpack(unsigned bits);
template <>
__device__ inline Pair<__nv_bfloat16> unpack<__nv_bfloat16>(unsigned bits) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u)};
}
template <>
__device__ inline Pair<__half> unpack<__half>(unsigned bits) {
  return {__half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xFFFFu))),
          __half2float(__ushort_as_half(static_cast<unsigned short>(bits >> 16)))};
}

}  // namespace dijiang::cuda
