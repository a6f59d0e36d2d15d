// Vectors by the compiler's own extension, as wide as the build's registers: one source for AVX-512, AVX2, SSE2 and
// NEON. Only for the files of this folder (see capability.h): everything is in the build's own namespace and inline.
#pragma once

#include <cstdint>

namespace in2nect::cpu::IN2NECT_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
};

template <typename A>
using Vec = typename VectorOf<A>::Vec;

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

#define IN2NECT_INLINE inline __attribute__((always_inline))

template <typename A>
IN2NECT_INLINE Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VectorOf<A>::Unaligned*>(p);
}

template <typename A>
IN2NECT_INLINE void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename VectorOf<A>::Unaligned*>(p) = v;
}

template <typename A>
IN2NECT_INLINE Vec<A> broadcast(A a) {
  return Vec<A>{} + a;
}

template <typename A>
IN2NECT_INLINE Vec<A> largest(Vec<A> a, Vec<A> b) {  // b where they do not compare
  return a > b ? a : b;
}

template <typename A>
IN2NECT_INLINE double horizontal_sum(Vec<A> v) {
  double total = 0;
  for (int i = 0; i < kLanes<A>; ++i) {
    total += static_cast<double>(v[i]);
  }
  return total;
}

template <typename A>
IN2NECT_INLINE A horizontal_max(Vec<A> v) {
  A found = v[0];
  for (int i = 1; i < kLanes<A>; ++i) {
    found = v[i] > found ? v[i] : found;
  }
  return found;
}

template <typename A>
IN2NECT_INLINE void clear(A* numbers, int64_t count) {
  for (int64_t n = 0; n < count; ++n) {
    numbers[n] = 0;
  }
}

template <typename A>
IN2NECT_INLINE void add(A* to, Vec<A> v) {
  store(to, load(to) + v);
}

// A square of vectors transposed: each stage exchanges the off-diagonal halves of ever smaller squares.
template <typename A>
IN2NECT_INLINE void transpose(Vec<A> (&square)[kLanes<A>]) {
  constexpr int kSide = kLanes<A>;
#pragma GCC unroll 4
  for (int half = kSide / 2; half > 0; half /= 2) {
    typename VectorOf<A>::Bits low, high;
    for (int c = 0; c < kSide; ++c) {
      low[c] = (c & half) != 0 ? kSide + c - half : c;
      high[c] = (c & half) != 0 ? kSide + c : c + half;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kSide; ++r) {
      if ((r & half) == 0) {
        const Vec<A> a = square[r], b = square[r + half];
        square[r] = __builtin_shuffle(a, b, low);
        square[r + half] = __builtin_shuffle(a, b, high);
      }
    }
  }
}

template <typename A>
struct Exp2;

// 2^x for x <= 1, 0 where it is no normal number; at most 2 ulp. x is split into a whole number, which goes into the
// exponent's bits, and the rest in [-1/2, 1/2], for which the minimax polynomial is off by 2e-9. NaN stays NaN.
template <>
struct Exp2<float> {
  static constexpr float kLowest = -126.0F, kZero = -127.0F;
  static constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to a whole number
  static IN2NECT_INLINE Vec<float> of(Vec<float> x) {
    x = x < kLowest ? broadcast(kZero) : x;  // there the exponent's bits come to 0, and 2^x to 0
    const Vec<float> rounded = x + kRound;
    const Vec<float> f = x - (rounded - kRound);
    Vec<float> p = broadcast(1.5345812e-4F);
    p = p * f + 1.3399931e-3F;
    p = p * f + 9.6184890e-3F;
    p = p * f + 5.5503288e-2F;
    p = p * f + 2.4022647e-1F;
    p = p * f + 6.9314721e-1F;
    p = p * f + 1.0F;
    using Bits = VectorOf<float>::Bits;
    return reinterpret_cast<Vec<float>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(rounded) << 23));
  }
};

// The same in float64: polynomial of degree 11, off by 3e-18.
template <>
struct Exp2<double> {
  static constexpr double kLowest = -1022.0, kZero = -1023.0, kRound = 6755399441055744.0;  // 1.5 * 2^52
  static IN2NECT_INLINE Vec<double> of(Vec<double> x) {
    x = x < kLowest ? broadcast(kZero) : x;
    const Vec<double> rounded = x + kRound;
    const Vec<double> f = x - (rounded - kRound);
    Vec<double> p = broadcast(4.4352809446103363e-10);
    p = p * f + 7.0741056262456594e-9;
    p = p * f + 1.0178198033328528e-7;
    p = p * f + 1.3215433089594629e-6;
    p = p * f + 1.5252733489960805e-5;
    p = p * f + 1.5403530462514613e-4;
    p = p * f + 1.3333558146789950e-3;
    p = p * f + 9.618129107588335e-3;
    p = p * f + 5.5504108664819921e-2;
    p = p * f + 2.4022650695910156e-1;
    p = p * f + 6.9314718055994533e-1;
    p = p * f + 1.0;
    using Bits = VectorOf<double>::Bits;
    return reinterpret_cast<Vec<double>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(rounded) << 52));
  }
};

}  // namespace in2nect::cpu::IN2NECT_CAPABILITY
