// The DCT of a power of two in registers. By Makhoul's reordering (csrc/cpu/dct_kernel.h) a DCT of
// n is a complex FFT of m = n / 2 numbers y between steps that take pairs y_k, y_{m-k}. A thread
// has 8 of the numbers, j + i m / 8; passes of radix 8, the last one of 8, 4 or 2, exchange them
// through shared memory. Four neighbouring elements of the row are what y_k and y_{m-1-k} are made
// of, so that rows are read, or written, four elements at a time.
#pragma once

#include "cuda/dct_rows.h"

namespace dijiang::cuda {

constexpr int kDctRegistersLeast = 4, kDctRegistersMost = 13;  // log2 n

template <int kLog>
struct DctPlan {
  static constexpr int n = 1 << kLog, m = n / 2, kBits = kLog - 1;
  static constexpr int kRowThreads = m / 8;
  static constexpr int kThreads = kRowThreads > 256 ? kRowThreads : 256;
  static constexpr int kRows = kThreads / kRowThreads;  // a block's, at a time
  static constexpr int kBlocks = 1024 / kThreads;       // on a multiprocessor
  static constexpr int kPasses = (kBits + 2) / 3;
  // Of a pass, and the length of the transforms that it joins.
  static constexpr int radix(int pass) {
    return pass + 1 < kPasses || kBits % 3 == 0 ? 8 : 1 << kBits % 3;
  }
  static constexpr int length(int pass) { return 1 << 3 * pass; }
  // Roots of unity of a pass: (radix - 1, length), behind those of the passes before.
  static constexpr int roots(int pass) {
    return pass <= 1 ? 0 : roots(pass - 1) + (radix(pass - 1) - 1) * length(pass - 1);
  }
  static constexpr int kRoots = roots(kPasses);
  // In shared memory, in pairs of floats: the numbers of kRows rows; behind them as tables the
  // roots, half of sqrt(2 / n) times the turns by pi k / 2n, k <= m / 2, and turns by 2 pi k / n.
  static constexpr int turns = kRoots, halves = turns + m / 2 + 1;
  static constexpr int kNumberBytes = kRows * m * 8;
  // What the places of row r are put together with: rows of few threads in different banks, too.
  static __host__ __device__ constexpr int row(int r) {
    return r * m ^ (r * kRowThreads & (m < 16 ? m - 1 : 15));
  }
  static constexpr int kBytes = kNumberBytes + (halves + m / 2 + 1) * 8;
};

// Where number i lies: 16 neighbours, and 16 that are 8 or 64 apart, are in different banks. Of a
// sum without carries it is the XOR of its parts' places.
__host__ __device__ constexpr int dct_place(int i) { return i ^ (i >> 4 & 7) ^ (i >> 3 & 8); }

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T x[4];
};

// w is (cos, sin): z exp(-i angle).
__device__ inline float2 rotate(float2 z, float2 w) {
  return make_float2(fmaf(z.x, w.x, z.y * w.y), fmaf(z.y, w.x, -z.x * w.y));
}
__device__ inline float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ inline float2 subtract(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
// -i z
__device__ inline float2 quarter_turn(float2 z) { return make_float2(z.y, -z.x); }

__device__ inline void transform_2(float2& a, float2& b) {
  const float2 difference = subtract(a, b);
  a = add(a, b);
  b = difference;
}
__device__ inline void transform_4(float2& a, float2& b, float2& c, float2& d) {
  transform_2(a, c);
  transform_2(b, d);
  const float2 turned = quarter_turn(d);
  d = subtract(c, turned);
  const float2 second = add(c, turned);
  c = subtract(a, b);
  a = add(a, b);
  b = second;
}
__device__ inline void transform_8(float2 (&z)[8]) {
  transform_4(z[0], z[2], z[4], z[6]);
  transform_4(z[1], z[3], z[5], z[7]);
  constexpr float kRoot = 0.70710678118654752f;
  const float2 odd[4] = {z[1], make_float2((z[3].x + z[3].y) * kRoot, (z[3].y - z[3].x) * kRoot),
                         quarter_turn(z[5]),
                         make_float2((z[7].y - z[7].x) * kRoot, (z[7].x + z[7].y) * -kRoot)};
  const float2 even[4] = {z[0], z[2], z[4], z[6]};
  DIJIANG_UNROLL()
  for (int k = 0; k < 4; ++k) {
    z[k] = add(even[k], odd[k]);
    z[k + 4] = subtract(even[k], odd[k]);
  }
}

template <class T, int kType, int kLog>
struct DctRow {
  using Plan = DctPlan<kLog>;
  static constexpr int n = Plan::n, m = Plan::m, kStep = Plan::kRowThreads;

  char* raw;
  const float2* tables;
  int j;
  int row, mine;   // in bytes: the row, and in it the thread's first number
  int64_t stride;  // of the row's elements
  bool quads;      // the row is read, or written, four elements at a time

  __device__ __forceinline__ DctRow(const DctRows& p, char* shared)
      : raw(shared),
        tables(reinterpret_cast<const float2*>(shared + Plan::kNumberBytes)),
        j(threadIdx.x % kStep),
        row(Plan::row(threadIdx.x / kStep) * 8),
        mine(row ^ 8 * dct_place(j)),
        stride(p.x.stride_dim),
        quads(p.quads) {}

  // At so many bytes. Places are put together by XOR, so that an address costs one instruction.
  __device__ __forceinline__ float2& at(int bytes) const {
    return *reinterpret_cast<float2*>(raw + bytes);
  }
  // The thread's number i.
  __device__ __forceinline__ float2& own(int i) const {
    return at(mine ^ 8 * dct_place(i * kStep));
  }
  // m - 1 less that.
  __device__ __forceinline__ float2& mirrored(int i) const {
    return at(mine ^ 8 * dct_place((m - 1) ^ (i * kStep)));
  }
  // Number k.
  __device__ __forceinline__ float2& number(int k) const { return at(row ^ 8 * dct_place(k)); }

  __device__ __forceinline__ float2 half_turn(int k) const { return tables[Plan::turns + k]; }
  __device__ __forceinline__ static void sync() {
    if constexpr (kStep <= 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // --- the FFT of y ------------------------------------------------------------------------------

  template <int kPass>
  __device__ __forceinline__ void pass(float2 (&z)[8]) const {
    constexpr int kRadix = Plan::radix(kPass), kLength = Plan::length(kPass);
    constexpr int kCount = 8 / kRadix;  // transforms of a thread
    if constexpr (kPass > 0) {
      DIJIANG_UNROLL()
      for (int h = 0; h < kCount; ++h) {
        const float2* root = tables + Plan::roots(kPass) + ((j + h * kStep) & (kLength - 1));
        DIJIANG_UNROLL()
        for (int r = 1; r < kRadix; ++r) {
          z[h + r * kCount] = rotate(z[h + r * kCount], root[(r - 1) * kLength]);
        }
      }
    }
    if constexpr (kRadix == 8) transform_8(z);
    if constexpr (kRadix == 4) {
      transform_4(z[0], z[2], z[4], z[6]);
      transform_4(z[1], z[3], z[5], z[7]);
    }
    if constexpr (kRadix == 2) {
      DIJIANG_UNROLL()
      for (int h = 0; h < 4; ++h) transform_2(z[h], z[h + 4]);
    }
    if constexpr (kPass + 1 < Plan::kPasses) {
      const int k = j & (kLength - 1), first = row ^ 8 * dct_place((j - k) * 8 + k);
      DIJIANG_UNROLL()
      for (int r = 0; r < 8; ++r) at(first ^ 8 * dct_place(r * kLength)) = z[r];
      sync();
      DIJIANG_UNROLL()
      for (int i = 0; i < 8; ++i) z[i] = own(i);
      sync();
      pass<kPass + 1>(z);
    }
  }

  // --- type 2 ------------------------------------------------------------------------------------

  template <class Read>
  __device__ __forceinline__ void take_quads(float2 (&z)[8], const Read& read) const {
    DIJIANG_UNROLL()
    for (int i = 0; i < 4; ++i) {
      const Quad<T> a = read(j + i * kStep), b = read(kStep - 1 - j + i * kStep);
      z[i] = make_float2(to_float(a.x[0]), to_float(a.x[2]));
      z[7 - i] = make_float2(to_float(b.x[3]), to_float(b.x[1]));
    }
  }
  __device__ __forceinline__ void load(const T* row, float2 (&z)[8]) const {
    if (quads) {
      take_quads(z, [&](int k) { return reinterpret_cast<const Quad<T>*>(row)[k]; });
    } else {
      take_quads(z, [&](int k) -> Quad<T> {
        const T* x = row + 4 * k * stride;
        return {{x[0], x[stride], x[2 * stride], x[3 * stride]}};
      });
    }
  }
  __device__ __forceinline__ void write(T* out, bool inside, const float2 (&z)[8]) const {
    DIJIANG_UNROLL()
    for (int i = 4; i < 8; ++i) own(i) = z[i];
    sync();
    float x[4][4];  // elements k, n - k, m - k, m + k
    DIJIANG_UNROLL()
    for (int i = 0; i < 4; ++i) {
      const int k = j + i * kStep;
      // Of k = 0 any number will do.
      const float2 v = z[i], w = number((m - k) & (m - 1)), t = half_turn(k);
      const float2 h = tables[Plan::halves + k], u = turn_of_partner(t);
      // Of the even elements' transform and of the odd ones', twice: V_k and V_{m-k} are their
      // sums.
      const float2 even = make_float2(v.x + w.x, v.y - w.y), o = make_float2(v.y + w.y, w.x - v.x);
      const float2 odd = make_float2(fmaf(h.x, o.x, h.y * o.y), fmaf(h.x, o.y, -h.y * o.x));
      const float2 here = add(even, odd);
      const float2 there = make_float2(even.x - odd.x, odd.y - even.y);
      x[i][0] = fmaf(t.x, here.x, t.y * here.y);
      x[i][1] = fmaf(t.y, here.x, -t.x * here.y);
      x[i][2] = fmaf(u.x, there.x, u.y * there.y);
      x[i][3] = fmaf(u.y, there.x, -u.x * there.y);
    }
    sync();
    const bool edge =
        j == 0;  // k = 0 has two elements; m / 2, which is its own partner, the others
    if (edge) {
      const float first = half_turn(0).x * 1.41421356237309505f;  // sqrt(1 / n)
      const float2 t = half_turn(m / 2);
      x[0][0] = first * (z[0].x + z[0].y);
      x[0][1] = 2.0f * fmaf(t.y, z[4].x, t.x * z[4].y);
      x[0][2] = first * (z[0].x - z[0].y);
      x[0][3] = 2.0f * fmaf(t.x, z[4].x, -t.y * z[4].y);
    }
    if (!inside) return;
    DIJIANG_UNROLL()
    for (int i = 0; i < 4; ++i) {
      const int k = j + i * kStep;
      out[k] = from_float<T>(x[i][0]);
      out[i == 0 && edge ? n - m / 2 : n - k] = from_float<T>(x[i][1]);
      out[m - k] = from_float<T>(x[i][2]);
      out[i == 0 && edge ? m / 2 : m + k] = from_float<T>(x[i][3]);
    }
  }
  // Of m - k: pi / 4 less the angle.
  __device__ __forceinline__ static float2 turn_of_partner(float2 t) {
    constexpr float kRoot = 0.70710678118654752f;
    return make_float2((t.x + t.y) * kRoot, (t.x - t.y) * kRoot);
  }

  // --- type 3 ------------------------------------------------------------------------------------

  // Real and imaginary part of y are swapped: an inverse FFT is a forward one between two swaps.
  __device__ __forceinline__ void load_spectrum(const T* row, float2 (&z)[8]) const {
    const auto get = [&](int k) { return to_float(row[k * stride]); };
    DIJIANG_UNROLL()
    for (int i = 0; i < 4; ++i) {
      const int k = j + i * kStep;
      if (k == 0) continue;
      const float2 t = half_turn(k), u = turn_of_partner(t), h = tables[Plan::halves + k];
      const float2 v = spectrum(t, get(k), get(n - k)), w = spectrum(u, get(m - k), get(m + k));
      const float2 o = make_float2(v.x - w.x, v.y + w.y);
      const float2 even = make_float2(v.y - w.y, v.x + w.x);
      const float2 odd = make_float2(fmaf(h.x, o.x, -h.y * o.y), fmaf(h.x, o.y, h.y * o.x));
      z[i] = make_float2(even.x + odd.x, even.y - odd.y);
      number(m - k) = make_float2(odd.x - even.x, even.y + odd.y);
    }
    if (j == 0) {
      const float first = half_turn(0).x * 1.41421356237309505f;  // sqrt(1 / n)
      const float a = get(0), b = get(m);
      z[0] = make_float2(first * (a - b), first * (a + b));
      const float2 v = spectrum(half_turn(m / 2), get(m / 2), get(n - m / 2));
      number(m / 2) = make_float2(-2.0f * v.y, 2.0f * v.x);
    }
    sync();
    DIJIANG_UNROLL()
    for (int i = 4; i < 8; ++i) z[i] = own(i);
    sync();
  }
  __device__ __forceinline__ static float2 spectrum(float2 t, float here, float there) {
    return make_float2(fmaf(t.x, here, t.y * there), fmaf(t.y, here, -t.x * there));
  }
  __device__ __forceinline__ void write_quads(T* out, bool inside, const float2 (&z)[8]) const {
    DIJIANG_UNROLL()
    for (int i = 4; i < 8; ++i) own(i) = z[i];
    sync();
    Quad<T> x[4];
    DIJIANG_UNROLL()
    for (int i = 0; i < 4; ++i) {
      const float2 w = mirrored(i);
      x[i] = {
          {from_float<T>(z[i].y), from_float<T>(w.x), from_float<T>(z[i].x), from_float<T>(w.y)}};
    }
    sync();
    if (!inside) return;
    DIJIANG_UNROLL()
    for (int i = 0; i < 4; ++i) {
      T* to = out + 4 * (j + i * kStep);
      if (quads) {
        *reinterpret_cast<Quad<T>*>(to) = x[i];
      } else {
        for (int e = 0; e < 4; ++e) to[e] = x[i].x[e];
      }
    }
  }
};

// Grid: tiles of rows.
template <class T, int kType, int kLog>
__global__ void __launch_bounds__(DctPlan<kLog>::kThreads, DctPlan<kLog>::kBlocks)
    dct_in_registers(DctRows p) {
  using Plan = DctPlan<kLog>;
  DIJIANG_DYNAMIC_SHARED(raw);
  auto* tables = reinterpret_cast<float2*>(raw + Plan::kNumberBytes);
  for (int pass = 1; pass < Plan::kPasses; ++pass) {
    const int length = Plan::length(pass), radix = Plan::radix(pass);
    for (int e = threadIdx.x; e < (radix - 1) * length; e += Plan::kThreads) {
      const int turns = (e / length + 1) * (e % length);
      tables[Plan::roots(pass) + e] = turn(2.0f * turns / (radix * length));
    }
  }
  for (int k = threadIdx.x; k <= Plan::m / 2; k += Plan::kThreads) {
    const float2 t = turn(0.5f * k / Plan::n);
    const float half = 0.5f * dct_scale(1, Plan::n);
    tables[Plan::turns + k] = make_float2(half * t.x, half * t.y);
    tables[Plan::halves + k] = turn(2.0f * k / Plan::n);
  }
  __syncthreads();
  const int local = threadIdx.x / Plan::kRowThreads;
  const DctRow<T, kType, kLog> row(p, raw);
  for (int64_t first = int64_t{blockIdx.x} * Plan::kRows; first < p.rows;
       first += int64_t{gridDim.x} * Plan::kRows) {
    const bool inside = first + local < p.rows;
    // Of those that are too many, the first row once more, and nothing is written.
    const auto number = static_cast<unsigned>(inside ? first + local : 0);
    const T* x = static_cast<const T*>(p.x.data) + p.offset_of(number);
    T* out = static_cast<T*>(p.out) + int64_t{number} * Plan::n;
    float2 z[8];
    if constexpr (kType == 2) {
      row.load(x, z);
    } else {
      row.load_spectrum(x, z);
    }
    row.template pass<0>(z);
    if constexpr (kType == 2) {
      row.write(out, inside, z);
    } else {
      row.write_quads(out, inside, z);
    }
  }
}

}  // namespace dijiang::cuda
