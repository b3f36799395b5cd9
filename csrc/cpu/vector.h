// Vectors of a fixed width on the compiler's own vector extension: x86 of any age and arm64 from one source.
//
// Include it after the target pragma of a translation unit (see isa/avx512.h) and after every other
// header: all of it is in an anonymous namespace, so that each instruction set keeps its own code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace iic_dist {
namespace {

template <typename A>
struct Lanes {
  static constexpr int kWidth = IIC_DIST_VECTOR_BYTES / sizeof(A);
  using Int = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  typedef A Vec __attribute__((vector_size(IIC_DIST_VECTOR_BYTES)));
  typedef Int IntVec __attribute__((vector_size(IIC_DIST_VECTOR_BYTES)));
};
template <typename A>
using Vec = typename Lanes<A>::Vec;
template <typename A>
using IntVec = typename Lanes<A>::IntVec;
template <typename A>
constexpr int kWidth = Lanes<A>::kWidth;

template <typename A>
inline Vec<A> load(const A* from) {
  Vec<A> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename A>
inline void store(A* to, Vec<A> v) {
  std::memcpy(to, &v, sizeof v);
}

template <typename A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};
}

// Copies count < 2 * Size elements in pieces of constant size: a call of memcpy for 40 bytes costs more.
template <int Size, typename T>
inline void copy_few(T* to, const T* from, int64_t count) {
  if (count & Size) {
    std::memcpy(to, from, Size * sizeof(T));
    to += Size;
    from += Size;
  }
  if constexpr (Size > 1) copy_few<Size / 2>(to, from, count);
}

template <typename A>
inline Vec<A> load_few(const A* from, int64_t count) {
  if (count >= kWidth<A>) return load(from);
  A padded[kWidth<A>] = {};
  copy_few<kWidth<A> / 2>(padded, from, count);
  return load(padded);
}

template <typename A>
inline void store_few(A* to, Vec<A> v, int64_t count) {
  if (count >= kWidth<A>) return store(to, v);
  A padded[kWidth<A>];
  store(padded, v);
  copy_few<kWidth<A> / 2>(to, padded, count);
}

// a0 b0 a1 b1 ... of the lower (Half = 0) or upper (Half = 1) halves of a and b.
template <typename A, int Half, size_t... I>
inline Vec<A> interleave(Vec<A> a, Vec<A> b, std::index_sequence<I...>) {
  constexpr int W = kWidth<A>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * W + Half * W / 2)...);
#else
  return __builtin_shuffle(a, b, IntVec<A>{(I / 2 + I % 2 * W + Half * W / 2)...});
#endif
}

template <typename A, int Half>
inline Vec<A> interleave(Vec<A> a, Vec<A> b) {
  return interleave<A, Half>(a, b, std::make_index_sequence<kWidth<A>>{});
}

// Transposes a square of W vectors: log2(W) rounds of interleaving its first half with its second.
template <typename A>
inline void transpose(Vec<A>* block) {
  constexpr int W = kWidth<A>;
#pragma GCC unroll 8
  for (int round = 1; round < W; round *= 2) {
    Vec<A> mixed[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      mixed[2 * i] = interleave<A, 0>(block[i], block[i + W / 2]);
      mixed[2 * i + 1] = interleave<A, 1>(block[i], block[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) block[i] = mixed[i];
  }
}

// The sums over lanes of W vectors, as the lanes of one: the transposition above, adding on the way.
template <typename A>
inline Vec<A> lane_sums(Vec<A>* block) {
  constexpr int W = kWidth<A>;
#pragma GCC unroll 8
  for (int half = W / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i)
      block[i] = interleave<A, 0>(block[i], block[i + half]) + interleave<A, 1>(block[i], block[i + half]);
  }
  return block[0];
}

template <typename A>
inline A lane_sum(Vec<A> v) {
  A sum = 0;
  for (int i = 0; i < kWidth<A>; ++i) sum += v[i];
  return sum;
}

// exp(x) for x <= 0, to about 1 ulp; 0 below -87.3, where float32 has no normal result; NaN for NaN.
// Coefficients: S. Moshier, Cephes, expf.
inline Vec<float> exp_not_positive(Vec<float> x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec<float> shifted = x * 1.44269504f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec<float> p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  const IntVec<float> exponent = ((IntVec<float>)shifted << 23) + (127 << 23);
  return x < -87.3f ? Vec<float>{} : p * (Vec<float>)exponent;
}

// ln(x) for normal x > 0, to about 1 ulp; NaN for NaN. Coefficients: S. Moshier, Cephes, logf.
inline Vec<float> log_normal(Vec<float> x) {
  constexpr int32_t kRootHalf = 0x3f3504f3;  // the bits of sqrt(1/2): mantissas from there to sqrt(2)
  const IntVec<float> bits = (IntVec<float>)x - kRootHalf;
  const Vec<float> n = __builtin_convertvector(bits >> 23, Vec<float>);
  const Vec<float> r = (Vec<float>)((bits & 0x7fffff) + kRootHalf) - 1.f;
  const Vec<float> r2 = r * r;
  Vec<float> p = 7.0376836292e-2f * r - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  p = p * r * r2 - n * 2.12194440e-4f - 0.5f * r2;
  return x == x ? r + p + n * 0.693359375f : x;
}

// float64 serves tests: the library's functions, lane by lane.
inline Vec<double> exp_not_positive(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

inline Vec<double> log_normal(Vec<double> x) {
  for (int i = 0; i < kWidth<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

}  // namespace
}  // namespace iic_dist
