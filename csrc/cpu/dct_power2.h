// DCT of any power of two: steps of the recursion of cpu/dct_network.h, two at a time, down to 8 or
// 16, which a network does. (One of 32 spills as much as two steps store: no faster, much longer.)
#pragma once

#include "cpu/dct_network.h"

namespace dijiang::cpu::DIJIANG_ISA {

// One copy of each network, however many places use it.
template <int n, bool kScaled, typename Acc>
[[gnu::noinline]] void short_dct2(const Vec<Acc>* x, Strided<Acc> out, const DctPlan<Acc>& plan) {
  network2<n, kScaled, Acc>(x, out, plan);
}
template <int n, bool kScaled, typename Acc>
[[gnu::noinline]] void short_dct4(const Vec<Acc>* x, Strided<Acc> out, const DctPlan<Acc>& plan) {
  network4<n, kScaled, Acc>(x, out, plan);
}
template <int n, bool kScaled, typename Acc>
[[gnu::noinline]] void short_dct3(Strided<Acc> in, Vec<Acc>* out, const DctPlan<Acc>& plan) {
  network3<n, kScaled, Acc>(in, out, plan);
}
template <int n, bool kScaled, typename Acc>
[[gnu::noinline]] void short_dct4_back(Strided<Acc> in, Vec<Acc>* out, const DctPlan<Acc>& plan) {
  network4_back<n, kScaled, Acc>(in, out, plan);
}

// What IV(n) at `places` is made of: cosine sums at the even ones, sine sums backwards at the odd
// ones, so that each pair (2k - 1, 2k) holds what its two results are the difference and the sum
// of.
template <typename Acc>
DIJIANG_INLINE void combine_sums(int64_t n, Strided<Acc> places) {
  Vec<Acc>* pair = places.p + places.stride;
  for (int64_t k = 1; k < n / 2; ++k, pair += 2 * places.stride) {
    const Vec<Acc> v = pair[0], u = pair[places.stride];
    pair[0] = u - v;
    pair[places.stride] = u + v;
  }
  *pair = -*pair;
}

// The second II(n) of an IV(2n) at `places`, which has the results of the first at its even ones.
template <int n, typename Acc>
[[gnu::noinline]] void short_dct2_of_sines(const Vec<Acc>* x, Strided<Acc> places,
                                           const DctPlan<Acc>& plan) {
  using Even = Alternate<Strided<Acc>, 0>;
  network2<n, false, Acc>(x, SineSums<n, Even, Strided<Acc>>{Even{places}, places}, plan);
}

// The two III(n) of an IV(2n) from `places`.
template <int n, typename Acc>
[[gnu::noinline]] void short_dct3_of_sums(Strided<Acc> places, Vec<Acc>* u, Vec<Acc>* v,
                                          const DctPlan<Acc>& plan) {
  network3<n, false, Acc>(PairSums<Acc, n, Strided<Acc>>{places}, u, plan);
  network3<n, false, Acc>(PairDifferences<Acc, n, Strided<Acc>>{places}, v, plan);
}

// x (n values) is destroyed; scratch holds n values; neither overlaps out.
template <bool kScaled, typename Acc>
[[gnu::noinline]] void dct4(int64_t n, Vec<Acc>* x, Vec<Acc>* scratch, Strided<Acc> out,
                            const DctPlan<Acc>& plan);

template <bool kScaled, typename Acc>
[[gnu::noinline]] void dct2(int64_t n, Vec<Acc>* x, Vec<Acc>* scratch, Strided<Acc> out,
                            const DctPlan<Acc>& plan) {
  if (n == 8) return short_dct2<8, kScaled, Acc>(x, out, plan);
  if (n == 16) return short_dct2<16, kScaled, Acc>(x, out, plan);
  const int64_t h = n / 2, q = n / 4;
  const Rotation<Acc>* table = rotations_of<kScaled>(plan, q);
  Vec<Acc>*sums = scratch, *differences = sums + q, *u = differences + q, *v = u + q;
#pragma GCC unroll 2
  for (int64_t j = 0; j < q; ++j) {
    const Vec<Acc> a = x[j], b = x[h - 1 - j], c = x[h + j], d = x[n - 1 - j];
    sums[j] = (a + d) + (b + c);
    differences[j] = (a + d) - (b + c);
    rotate<Acc>(table[j], j % 2, a - d, b - c, u[j], v[j]);
  }
  const int64_t s = out.stride;
  dct2<kScaled, Acc>(q, sums, x, {out.p, 4 * s}, plan);
  dct4<kScaled, Acc>(q, differences, x, {out.p + 2 * s, 4 * s}, plan);
  dct2<false, Acc>(q, u, x, {out.p + s, 4 * s}, plan);
  if (q == 8) return short_dct2_of_sines<8, Acc>(v, {out.p + s, 2 * s}, plan);
  if (q == 16) return short_dct2_of_sines<16, Acc>(v, {out.p + s, 2 * s}, plan);
  dct2<false, Acc>(q, v, x, {out.p + (n - 1) * s, -4 * s}, plan);
  combine_sums<Acc>(h, {out.p + s, 2 * s});
}

template <bool kScaled, typename Acc>
[[gnu::noinline]] void dct4(int64_t n, Vec<Acc>* x, Vec<Acc>* scratch, Strided<Acc> out,
                            const DctPlan<Acc>& plan) {
  if (n == 8) return short_dct4<8, kScaled, Acc>(x, out, plan);
  if (n == 16) return short_dct4<16, kScaled, Acc>(x, out, plan);
  const int64_t h = n / 2, q = n / 4;
  const Rotation<Acc>* table = rotations_of<kScaled>(plan, h);
  Vec<Acc>*u_sums = scratch, *u_differences = u_sums + q;
  Vec<Acc>*v_sums = u_differences + q, *v_differences = v_sums + q;
#pragma GCC unroll 2
  for (int64_t j = 0; j < q; ++j) {
    Vec<Acc> u, v, u_mirror, v_mirror;
    rotate<Acc>(table[j], j % 2, x[j], x[n - 1 - j], u, v);
    rotate<Acc>(table[h - 1 - j], (h - 1 - j) % 2, x[h - 1 - j], x[h + j], u_mirror, v_mirror);
    u_sums[j] = u + u_mirror;
    u_differences[j] = u - u_mirror;
    v_sums[j] = v + v_mirror;
    v_differences[j] = v - v_mirror;
  }
  const int64_t s = out.stride;
  Vec<Acc>* last = out.p + (n - 1) * s;
  dct2<false, Acc>(q, u_sums, x, {out.p, 4 * s}, plan);
  dct4<false, Acc>(q, u_differences, x, {out.p + 2 * s, 4 * s}, plan);
  dct2<false, Acc>(q, v_sums, x, {last, -4 * s}, plan);
  dct4<false, Acc>(q, v_differences, x, {last - 2 * s, -4 * s}, plan);
  combine_sums<Acc>(n, out);
}

// The transposes, from `in`, which is destroyed, to out; scratch and out hold n values each.
template <bool kScaled, typename Acc>
[[gnu::noinline]] void dct4_back(int64_t n, Strided<Acc> in, Vec<Acc>* scratch, Vec<Acc>* out,
                                 const DctPlan<Acc>& plan);

template <bool kScaled, typename Acc>
[[gnu::noinline]] void dct3(int64_t n, Strided<Acc> in, Vec<Acc>* scratch, Vec<Acc>* out,
                            const DctPlan<Acc>& plan) {
  if (n == 8) return short_dct3<8, kScaled, Acc>(in, out, plan);
  if (n == 16) return short_dct3<16, kScaled, Acc>(in, out, plan);
  const int64_t h = n / 2, q = n / 4, s = in.stride;
  const Rotation<Acc>* table = rotations_of<kScaled>(plan, q);
  Vec<Acc>*even = scratch, *odd = even + q, *u = odd + q, *v = u + q;
  dct3<kScaled, Acc>(q, {in.p, 4 * s}, out, even, plan);
  dct4_back<kScaled, Acc>(q, {in.p + 2 * s, 4 * s}, out, odd, plan);
  if (q == 8) {
    short_dct3_of_sums<8, Acc>({in.p + s, 2 * s}, u, v, plan);
  } else if (q == 16) {
    short_dct3_of_sums<16, Acc>({in.p + s, 2 * s}, u, v, plan);
  } else {
    combine_sums<Acc>(h, {in.p + s, 2 * s});
    dct3<false, Acc>(q, {in.p + s, 4 * s}, out, u, plan);
    dct3<false, Acc>(q, {in.p + (n - 1) * s, -4 * s}, out, v, plan);
  }
#pragma GCC unroll 2
  for (int64_t j = 0; j < q; ++j) {
    Vec<Acc> a, b;
    rotate_back<Acc>(table[j], j % 2, u[j], v[j], a, b);
    const Vec<Acc> c = even[j] + odd[j], d = even[j] - odd[j];
    out[j] = c + a;
    out[n - 1 - j] = c - a;
    out[h - 1 - j] = d + b;
    out[h + j] = d - b;
  }
}

template <bool kScaled, typename Acc>
[[gnu::noinline]] void dct4_back(int64_t n, Strided<Acc> in, Vec<Acc>* scratch, Vec<Acc>* out,
                                 const DctPlan<Acc>& plan) {
  if (n == 8) return short_dct4_back<8, kScaled, Acc>(in, out, plan);
  if (n == 16) return short_dct4_back<16, kScaled, Acc>(in, out, plan);
  const int64_t h = n / 2, q = n / 4, s = in.stride;
  const Rotation<Acc>* table = rotations_of<kScaled>(plan, h);
  Vec<Acc>*u_even = scratch, *u_odd = u_even + q, *v_even = u_odd + q, *v_odd = v_even + q;
  Vec<Acc>* last = in.p + (n - 1) * s;
  combine_sums<Acc>(n, in);
  dct3<false, Acc>(q, {in.p, 4 * s}, out, u_even, plan);
  dct4_back<false, Acc>(q, {in.p + 2 * s, 4 * s}, out, u_odd, plan);
  dct3<false, Acc>(q, {last, -4 * s}, out, v_even, plan);
  dct4_back<false, Acc>(q, {last - 2 * s, -4 * s}, out, v_odd, plan);
#pragma GCC unroll 2
  for (int64_t j = 0; j < q; ++j) {
    const Vec<Acc> a = u_even[j], b = u_odd[j], c = v_even[j], d = v_odd[j];
    rotate_back<Acc>(table[j], j % 2, a + b, c + d, out[j], out[n - 1 - j]);
    rotate_back<Acc>(table[h - 1 - j], (h - 1 - j) % 2, a - b, c - d, out[h - 1 - j], out[h + j]);
  }
}

// The transform of x, which is destroyed, to out, with the factors a_k; scratch holds n values.
template <int type, typename Acc>
void dct_power_of_two(const DctPlan<Acc>& plan, Vec<Acc>* x, Vec<Acc>* scratch, Vec<Acc>* out) {
  const auto short_dct = [&](auto length) {
    if constexpr (type == 2) {
      short_dct2<length.value, true, Acc>(x, {out, 1}, plan);
    } else {
      short_dct3<length.value, true, Acc>({x, 1}, out, plan);
    }
  };
  switch (plan.n) {
    case 1: return short_dct(std::integral_constant<int, 1>());
    case 2: return short_dct(std::integral_constant<int, 2>());
    case 4: return short_dct(std::integral_constant<int, 4>());
  }
  if constexpr (type == 2) {
    dct2<true, Acc>(plan.n, x, scratch, {out, 1}, plan);
  } else {
    dct3<true, Acc>(plan.n, {x, 1}, scratch, out, plan);
  }
}

}  // namespace dijiang::cpu::DIJIANG_ISA
