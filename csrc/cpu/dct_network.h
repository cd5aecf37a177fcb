// DCT of short power-of-two lengths in straight lines of vector code, by the orthogonal split-radix
// recursion (Plonka and Tasche, "Fast and numerically stable algorithms for discrete cosine
// transforms", 2005): every step is a sum and difference or a rotation, so that errors do not grow
// as they do in Lee's recursion, which divides by cosines near zero.
//
//   II:  X_k = sum_j x_j cos(pi (2j+1) k / 2n)         even k: II(n/2) of sums,
//                                                      odd k: IV(n/2) of differences
//   IV:  X_k = sum_j x_j cos(pi (2j+1)(2k+1) / 4n)     rotations, then two II(n/2)
//   III: the transpose of II, step by step; it needs the transpose of IV, which is IV again in
//        other steps.
//
// A transform with kScaled has the factors a_k: a_1 is in the first rotations of its path.
#pragma once

#include "cpu/dct_plan.h"
#include "cpu/simd.h"

namespace dijiang::cpu::DIJIANG_ISA {

// IV(n) is made of the II(n/2) of u and v.
template <typename Acc>
DIJIANG_INLINE void rotate(Rotation<Acc> r, bool odd, Vec<Acc> a, Vec<Acc> b, Vec<Acc>& u,
                           Vec<Acc>& v) {
  u = r.cos * a + r.sin * b;
  v = odd ? r.sin * a - r.cos * b : r.cos * b - r.sin * a;
}
template <typename Acc>
DIJIANG_INLINE void rotate_back(Rotation<Acc> r, bool odd, Vec<Acc> u, Vec<Acc> v, Vec<Acc>& a,
                                Vec<Acc>& b) {
  a = odd ? r.cos * u + r.sin * v : r.cos * u - r.sin * v;
  b = odd ? r.sin * u - r.cos * v : r.sin * u + r.cos * v;
}

template <bool kScaled, typename Acc>
DIJIANG_INLINE const Rotation<Acc>* rotations_of(const DctPlan<Acc>& plan, int64_t m) {
  return (kScaled ? plan.scaled_rotations : plan.rotations) + m;
}

// Where a network puts its result k, and where the transposed one takes its k-th number from.
template <typename Acc>
struct Strided {
  Vec<Acc>* p;
  int64_t stride;
  DIJIANG_INLINE void put(int k, Vec<Acc> v) const { p[k * stride] = v; }
  DIJIANG_INLINE Vec<Acc> get(int k) const { return p[k * stride]; }
};

// Every other place of another.
template <typename Places, int kFirst>
struct Alternate {
  const Places& places;
  template <typename V>
  DIJIANG_INLINE void put(int k, V v) const {
    places.put(2 * k + kFirst, v);
  }
  DIJIANG_INLINE auto get(int k) const { return places.get(2 * k + kFirst); }
};

// The sine sums of IV(2m), which with its cosine sums make two results each.
template <int m, typename Cosines, typename Places>
struct SineSums {
  const Cosines& cosines;
  const Places& places;
  template <typename V>
  DIJIANG_INLINE void put(int k, V v) const {
    if (k == 0) {
      places.put(0, cosines.get(0));
      places.put(2 * m - 1, -v);
    } else {
      const V u = cosines.get(m - k);
      places.put(2 * (m - k), u + v);
      places.put(2 * (m - k) - 1, u - v);
    }
  }
};

// In an array.
template <typename Acc, int n>
struct Array {
  Vec<Acc> (&v)[n];
  DIJIANG_INLINE void put(int k, Vec<Acc> x) const { v[k] = x; }
  DIJIANG_INLINE Vec<Acc> get(int k) const { return v[k]; }
};

// The transpose of SineSums: what the two III(m) of IV(2m) start from.
template <typename Acc, int m, typename Places>
struct PairSums {
  const Places& places;
  DIJIANG_INLINE Vec<Acc> get(int k) const {
    return k == 0 ? places.get(0) : places.get(2 * k) + places.get(2 * k - 1);
  }
};
template <typename Acc, int m, typename Places>
struct PairDifferences {
  const Places& places;
  DIJIANG_INLINE Vec<Acc> get(int k) const {
    return k == 0 ? -places.get(2 * m - 1) : places.get(2 * (m - k)) - places.get(2 * (m - k) - 1);
  }
};

template <int n, bool kScaled, typename Acc, typename Out>
DIJIANG_INLINE void network4(const Vec<Acc>* x, const Out& out, const DctPlan<Acc>& plan);

template <int n, bool kScaled, typename Acc, typename Out>
DIJIANG_INLINE void network2(const Vec<Acc>* x, const Out& out, const DctPlan<Acc>& plan) {
  if constexpr (n == 1) {
    out.put(0, kScaled ? x[0] * plan.first_scale : x[0]);
  } else {
    constexpr int m = n / 2;
    Vec<Acc> sum[m], difference[m];
#pragma GCC unroll 8
    for (int j = 0; j < m; ++j) {
      sum[j] = x[j] + x[n - 1 - j];
      difference[j] = x[j] - x[n - 1 - j];
    }
    network2<m, kScaled, Acc>(sum, Alternate<Out, 0>{out}, plan);
    network4<m, kScaled, Acc>(difference, Alternate<Out, 1>{out}, plan);
  }
}

template <int n, bool kScaled, typename Acc, typename Out>
DIJIANG_INLINE void network4(const Vec<Acc>* x, const Out& out, const DctPlan<Acc>& plan) {
  if constexpr (n == 1) {
    out.put(0, x[0] * rotations_of<kScaled>(plan, 0)->cos);
  } else {
    constexpr int m = n / 2;
    const Rotation<Acc>* table = rotations_of<kScaled>(plan, m);
    Vec<Acc> u[m], v[m], cosines[m];
#pragma GCC unroll 8
    for (int j = 0; j < m; ++j) rotate<Acc>(table[j], j % 2, x[j], x[n - 1 - j], u[j], v[j]);
    const Array<Acc, m> sums{cosines};
    network2<m, false, Acc>(u, sums, plan);
    network2<m, false, Acc>(v, SineSums<m, Array<Acc, m>, Out>{sums, out}, plan);
  }
}

template <int n, bool kScaled, typename Acc, typename In>
DIJIANG_INLINE void network4_back(const In& in, Vec<Acc>* out, const DctPlan<Acc>& plan);

template <int n, bool kScaled, typename Acc, typename In>
DIJIANG_INLINE void network3(const In& in, Vec<Acc>* out, const DctPlan<Acc>& plan) {
  if constexpr (n == 1) {
    out[0] = kScaled ? in.get(0) * plan.first_scale : in.get(0);
  } else {
    constexpr int m = n / 2;
    Vec<Acc> even[m], odd[m];
    network3<m, kScaled, Acc>(Alternate<In, 0>{in}, even, plan);
    network4_back<m, kScaled, Acc>(Alternate<In, 1>{in}, odd, plan);
#pragma GCC unroll 8
    for (int j = 0; j < m; ++j) {
      out[j] = even[j] + odd[j];
      out[n - 1 - j] = even[j] - odd[j];
    }
  }
}

template <int n, bool kScaled, typename Acc, typename In>
DIJIANG_INLINE void network4_back(const In& in, Vec<Acc>* out, const DctPlan<Acc>& plan) {
  if constexpr (n == 1) {
    out[0] = in.get(0) * rotations_of<kScaled>(plan, 0)->cos;
  } else {
    constexpr int m = n / 2;
    const Rotation<Acc>* table = rotations_of<kScaled>(plan, m);
    Vec<Acc> u[m], v[m];
    network3<m, false, Acc>(PairSums<Acc, m, In>{in}, u, plan);
    network3<m, false, Acc>(PairDifferences<Acc, m, In>{in}, v, plan);
#pragma GCC unroll 8
    for (int j = 0; j < m; ++j)
      rotate_back<Acc>(table[j], j % 2, u[j], v[j], out[j], out[n - 1 - j]);
  }
}

}  // namespace dijiang::cpu::DIJIANG_ISA
