// The inner loops of class_sums; see class_sums.h for what each does. Vectors are the compiler's own, as wide as the
// capability has registers, and a pixel is touched by no branch: label images hold runs of a few pixels, and a branch a
// run, mispredicted, costs more than the sums.
#include "class_sums.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace in2nect::cpu::IN2NECT_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
constexpr __mmask16 kAllLanes = 0xffff;  // for the forms with a mask: GCC 12 warns of its own header in the others
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

// A hardware prefetcher follows the rows of a tile no further than each goes: this many are asked for ahead.
constexpr int64_t kAheadChannels = 4;
// How far ahead a stream of rows is asked for: a hardware prefetcher stops at the end of each page of 4 KiB.
constexpr int64_t kAheadBytes = 4096;
// Streams: how many channels are read side by side, and of how many classes the sums stay in registers meanwhile (14 of
// AVX-512's 32, 8 of the others' 16). The lines ahead are those of the streams themselves.
#if defined(__AVX512F__)
constexpr int kStreamChannels = 2, kStreamClasses = 7;
#else
constexpr int kStreamChannels = 2, kStreamClasses = 4;
#endif
constexpr int64_t kStreamAheadBytes = 4096;
// Terms that a lane sums in a float before they go to the doubles.
constexpr int64_t kStreamTerms = 128;
// A row no longer than this counts as zero, as in ../../common/tensors.h.
constexpr double kZeroNorm = 1e-12;

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  static constexpr int lanes = kBytes / 4;
  typedef float type __attribute__((vector_size(kBytes)));
  typedef int32_t mask __attribute__((vector_size(kBytes)));
  typedef int32_t codes __attribute__((vector_size(kBytes)));
  typedef uint16_t halves __attribute__((vector_size(kBytes / 2)));
};
template <>
struct VectorOf<double> {
  static constexpr int lanes = kBytes / 8;
  typedef double type __attribute__((vector_size(kBytes)));
  typedef int64_t mask __attribute__((vector_size(kBytes)));
  typedef int32_t codes __attribute__((vector_size(kBytes / 2)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;
template <typename A>
using Mask = typename VectorOf<A>::mask;
template <typename A>
constexpr int kLanes = VectorOf<A>::lanes;
using Halves = VectorOf<float>::halves;
using Bits = Mask<float>;

// A vector anywhere in memory, of any type. Not by memcpy: GCC 12 keeps what a memcpy of 64 bytes touches in memory.
template <typename V>
struct Loose {
  typedef V type __attribute__((aligned(1), may_alias));
};
template <typename V>
inline V load_raw(const void* from) {
  return *static_cast<const typename Loose<V>::type*>(from);
}
template <typename V>
inline void store_raw(void* to, V v) {
  *static_cast<typename Loose<V>::type*>(to) = v;
}
// One number for every lane.
template <typename V, typename E>
inline V all(E value) {
  return V{} + value;
}
template <typename V>
inline V choose(Bits condition, V yes, V no) {
  return (V)((condition & (Bits)yes) | (~condition & (Bits)no));
}

// The sum of the lanes, halves onto halves: a chain of log2(lanes) additions.
template <typename A, int kCount>
inline A sum_of(const A* lanes) {
  if constexpr (kCount == 1) {
    return lanes[0];
  } else {
    typedef A Half __attribute__((vector_size(kCount / 2 * sizeof(A))));
    A halves[kCount / 2];
    store_raw(halves, load_raw<Half>(lanes) + load_raw<Half>(lanes + kCount / 2));
    return sum_of<A, kCount / 2>(halves);
  }
}
template <typename A>
inline A total(Vector<A> v) {
  A lanes[kLanes<A>];
  store_raw(lanes, v);
  return sum_of<A, kLanes<A>>(lanes);
}

// ---- stored elements as accumulators, and back ----------------------------------------------------------------------

inline Vector<float> widen(Halves stored, BFloat16Bits) {
  return (Vector<float>)(__builtin_convertvector(stored, Bits) << 16);
}

inline Vector<float> widen(Halves stored, HalfBits) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(kAllLanes, (__m256i)stored);
#else
  const Bits bits = __builtin_convertvector(stored, Bits);
  const Bits sign = (bits & 0x8000) << 16, magnitude = (bits & 0x7fff) << 13;
  constexpr int32_t kRebias = (127 - 15) << 23, kLeastNormal = (127 - 14) << 23;
  const Bits normal = magnitude + kRebias;
  const Bits special = magnitude + 2 * kRebias;  // infinity and NaN
  // A subnormal is a fraction of the least normal number: write it behind that number's bits, and take that off.
  const Vector<float> least = (Vector<float>)all<Bits>(kLeastNormal);
  const Bits subnormal = (Bits)((Vector<float>)(magnitude + kLeastNormal) - least);
  const Bits finite = choose(magnitude < (0x400 << 13), subnormal, normal);
  return (Vector<float>)(choose(magnitude >= (0x7c00 << 13), special, finite) | sign);
#endif
}

// Round to nearest, ties to even.
inline Halves narrow(Vector<float> v, BFloat16Bits) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits nan = (bits & 0x7fffffff) > 0x7f800000;
  return __builtin_convertvector(choose(nan, all<Bits>(0x7fc0), rounded) & 0xffff, Halves);
}

inline Halves narrow(Vector<float> v, HalfBits) {
#if defined(__AVX512F__)
  return (Halves)_mm512_maskz_cvtps_ph(kAllLanes, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Bits sign = (Bits)v & INT32_MIN, magnitude = (Bits)v ^ sign;
  constexpr int32_t kRebias = (127 - 15) << 23, kLeastNormal = (127 - 14) << 23, kTooLarge = (127 + 16) << 23;
  const Bits normal = (magnitude - kRebias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The sum with 0.5 rounds to the spacing of subnormals, 2^-24.
  const Bits subnormal = (Bits)((Vector<float>)magnitude + 0.5f) - (126 << 23);
  const Bits special = choose(magnitude > 0x7f800000, all<Bits>(0x7e00), all<Bits>(0x7c00));
  const Bits finite = choose(magnitude < kLeastNormal, subnormal, normal);
  const Bits bits = choose(magnitude >= kTooLarge, special, finite) | ((sign >> 16) & 0x8000);
  return __builtin_convertvector(bits, Halves);
#endif
}

inline Vector<float> load(const float* from) {
  return load_raw<Vector<float>>(from);
}
inline Vector<double> load(const double* from) {
  return load_raw<Vector<double>>(from);
}
template <typename S>
inline Vector<float> load(const S* from) {
  return widen(load_raw<Halves>(from), S{});
}
inline void store(float* to, Vector<float> v) {
  store_raw(to, v);
}
inline void store(double* to, Vector<double> v) {
  store_raw(to, v);
}
template <typename S>
inline void store(S* to, Vector<float> v) {
  store_raw(to, narrow(v, S{}));
}

// A whole block where there is one, else its first lanes; the others are zero.
template <typename A, typename S>
inline Vector<A> load_some(const S* from, int64_t count) {
  if (count >= kLanes<A>) {
    return load(from);
  }
  S block[kLanes<A>] = {};
  __builtin_memcpy(block, from, count * sizeof(S));
  return load(block);
}
template <typename A, typename S>
inline void store_some(S* to, int64_t count, Vector<A> v) {
  if (count >= kLanes<A>) {
    return store(to, v);
  }
  S block[kLanes<A>];
  store(block, v);
  __builtin_memcpy(to, block, count * sizeof(S));
}

template <typename S, typename A>
void widen_all(const S* from, int64_t count, A* to) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    store_some<A>(to + i, count - i, load_some<A>(from + i, count - i));
  }
}

template <typename S, typename A>
void narrow_all(const A* from, int64_t count, S* to) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    store_some<A>(to + i, count - i, load_some<A>(from + i, count - i));
  }
}

template <typename S, typename A>
void blend(const S* a, const S* b, A low, A high, int64_t count, A* out) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const int64_t left = count - i;
    store_some<A>(out + i, left, low * load_some<A>(a + i, left) + high * load_some<A>(b + i, left));
  }
}

// ---- labels ---------------------------------------------------------------------------------------------------------

template <typename L>
int64_t read_labels(const L* labels, int64_t count, int64_t classes, int64_t ignore, int32_t* codes) {
  int32_t strays = 0;  // a tile of at most thousands
#pragma omp simd reduction(+ : strays)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t label = static_cast<int64_t>(labels[i]);
    const bool known = static_cast<uint64_t>(label) < static_cast<uint64_t>(classes), ignored = label == ignore;
    codes[i] = known && !ignored ? static_cast<int32_t>(label) : -1;
    strays += !known && !ignored ? 1 : 0;
  }
  return strays;
}

// Which of kCount codes are `label`, a bit each.
template <int kCount>
inline uint32_t matches(const int32_t* codes, int32_t label) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16) {
    return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(codes), _mm512_set1_epi32(label));
  }
#endif
#if defined(__AVX2__)
  if constexpr (kCount == 8) {
    const __m256i found = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i*)codes), _mm256_set1_epi32(label));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(found)));
  }
#endif
#if defined(__SSE2__)
  if constexpr (kCount == 4) {
    const __m128i found = _mm_cmpeq_epi32(_mm_loadu_si128((const __m128i*)codes), _mm_set1_epi32(label));
    return static_cast<uint32_t>(_mm_movemask_ps(_mm_castsi128_ps(found)));
  }
#endif
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kCount; ++lane) {
    bits |= static_cast<uint32_t>(codes[lane] == label) << lane;
  }
  return bits;
}

// Up to so many classes each is counted by itself, a block of codes at a time, and the codes of a section meanwhile stay
// in a first-level cache: 0.35 clocks a pixel at 7 classes, where an increment takes 1.
constexpr int64_t kCountedClasses = 16, kCountedSection = 2048;

// Four tables in turn: neighbours are mostly of one class, and an increment waits for the last of the same place.
void count_codes(const int32_t* codes, int64_t count, int32_t* counts, int64_t pitch) {
  int64_t i = 0;
#if defined(__POPCNT__)
  constexpr int kBlock = kLanes<float>;
  for (const int64_t whole = count / kBlock * kBlock; pitch - 1 <= kCountedClasses && i < whole;) {
    const int64_t end = i + kCountedSection < whole ? i + kCountedSection : whole;
    for (int32_t label = 0; label < pitch - 1; ++label) {
      int32_t found = 0;
      for (int64_t j = i; j < end; j += kBlock) {
        found += __builtin_popcount(matches<kBlock>(codes + j, label));
      }
      counts[label] += found;
    }
    i = end;
  }
#endif
  for (; i + 4 <= count; i += 4) {
    ++counts[codes[i]];
    ++counts[pitch + codes[i + 1]];
    ++counts[2 * pitch + codes[i + 2]];
    ++counts[3 * pitch + codes[i + 3]];
  }
  for (; i < count; ++i) {
    ++counts[codes[i]];
  }
}

// Class by class, without a branch on what the labels are.
template <int kCount>
void find_blocks_of(int32_t* codes, int64_t count, ClassOfBlocks* present, int64_t classes, Block* blocks) {
  const int64_t whole = count / kCount * kCount, rest = count - whole;
  // A last block that is not whole ends where the tile does; its codes, without the pixels of the block before, stand
  // behind the tile's. Where the tile is no block in all, pixels of no class complete it.
  const int64_t last = whole > 0 ? count - kCount : 0, last_codes = whole > 0 ? count : 0;
  for (int64_t lane = 0; rest > 0 && whole > 0 && lane < kCount; ++lane) {
    codes[count + lane] = last + lane >= whole ? codes[last + lane] : -1;
  }
  for (int64_t i = count; whole == 0 && i < kCount; ++i) {
    codes[i] = -1;
  }
  int32_t found = 0;
  for (int64_t slot = 0; slot < classes; ++slot) {
    const int32_t label = present[slot].label;
    for (int64_t i = 0; i < whole; i += kCount) {
      blocks[found] = {static_cast<int32_t>(i), static_cast<int32_t>(i)};
      found += matches<kCount>(codes + i, label) != 0;
    }
    if (rest > 0) {
      blocks[found] = {static_cast<int32_t>(last), static_cast<int32_t>(last_codes)};
      found += matches<kCount>(codes + last_codes, label) != 0;
    }
    present[slot].end = found;
  }
}

void find_blocks(int32_t* codes, int64_t count, int64_t lanes, ClassOfBlocks* present, int64_t classes,
                 Block* blocks) {
  if (lanes == kLanes<float>) {
    find_blocks_of<kLanes<float>>(codes, count, present, classes, blocks);
  } else {
    find_blocks_of<kLanes<double>>(codes, count, present, classes, blocks);
  }
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Four blocks of pixels over all channels, in registers, before the next four: loads that do not wait for one another.
template <typename S, typename A>
void norms_pixels(const S* z, int64_t channel, int64_t count, int64_t d, A* norms) {
  constexpr int64_t kStep = 4 * kLanes<A>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    Vector<A> sums[4] = {};
    for (int64_t c = 0; c < d; ++c) {
      for (int64_t j = 0; j < 4; ++j) {
        const Vector<A> v = load(z + c * channel + i + j * kLanes<A>);
        sums[j] += v * v;
      }
    }
    for (int64_t j = 0; j < 4; ++j) {
      store(norms + i + j * kLanes<A>, sums[j]);
    }
  }
  for (; i < count; i += kLanes<A>) {
    Vector<A> sum = {};
    for (int64_t c = 0; c < d; ++c) {
      const Vector<A> v = load_some<A>(z + c * channel + i, count - i);
      sum += v * v;
    }
    store_some<A>(norms + i, count - i, sum);
  }
}

template <typename S, typename A>
void norms_channels(const S* z, int64_t pixel, int64_t count, int64_t d, A* out) {
  for (int64_t i = 0; i < count; ++i) {
    const S* row = z + i * pixel;
    Vector<A> sum = {};
    for (int64_t c = 0; c < d; c += kLanes<A>) {
      const Vector<A> v = load_some<A>(row + c, d - c);
      sum += v * v;
    }
    out[i] = total<A>(sum);
  }
}

inline float root(float x) {
  return __builtin_sqrtf(x);
}
inline double root(double x) {
  return __builtin_sqrt(x);
}

template <typename A>
void unit_scales(A* norms, int64_t count, A* scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const A norm = root(norms[i]);
    scale[i] = A(1) / (norm > A(kZeroNorm) ? norm : A(kZeroNorm));
    norms[i] *= scale[i] * scale[i];
  }
}

// Lanes whose code is `label`, all bits set.
template <typename A>
inline Mask<A> lanes_of(const int32_t* codes, int32_t label) {
  const auto found = load_raw<typename VectorOf<A>::codes>(codes) == label;
  if constexpr (sizeof(A) == 4) {
    return found;
  } else {
    return __builtin_convertvector(found, Mask<A>);
  }
}

// Class by class, so that sums stay in registers: kept in memory by class they cost a store and a load of the same
// place a block, several times the addition.
template <typename S, typename A, int kChannels, bool kScaled>
inline void add_some_channels(const S* z, int64_t channel, const Block* blocks, const ClassOfBlocks* present,
                              int64_t present_count, const int32_t* codes, const A* scale, double* sums,
                              int64_t stride, const S* ahead, int64_t pixels) {
  // Meanwhile the next channels are asked for, from `ahead` on, a few lines a block: rows of a tile are too short for
  // a hardware prefetcher to hide what each costs to begin.
  constexpr int64_t kLines = 4, kLine = 64 / sizeof(S);
  const S* const ahead_end = ahead == nullptr ? nullptr : ahead + kChannels * channel;
  int64_t line = 0;
  int64_t i = 0;
  for (int64_t slot = 0; slot < present_count; ++slot) {
    const int32_t label = present[slot].label;
    Vector<A> sum[kChannels] = {};
    for (; i < present[slot].end; ++i) {
      const Mask<A> mask = lanes_of<A>(codes + blocks[i].codes, label);
      const S* from = z + blocks[i].pixel;
      if (ahead != ahead_end) {
        for (int64_t j = 0; j < kLines; ++j) {
          __builtin_prefetch(ahead + line + j * kLine);
        }
        line += kLines * kLine;
        if (line >= pixels) {
          line = 0;
          ahead += channel;
        }
      }
      Vector<A> factor;
      if constexpr (kScaled) {
        factor = load(scale + blocks[i].pixel);
      }
      for (int c = 0; c < kChannels; ++c) {
        Vector<A> v = load(from + c * channel);
        if constexpr (kScaled) {
          v *= factor;
        }
        sum[c] += (Vector<A>)((Mask<A>)v & mask);  // not multiplied by zero: a NaN of another class must not spread
      }
    }
    for (int c = 0; c < kChannels; ++c) {
      sums[label * stride + c] += static_cast<double>(total<A>(sum[c]));
    }
  }
}

template <typename S, typename A, bool kScaled>
inline void add_all_channels(const S* z, int64_t channel, int64_t d, const Block* blocks, const ClassOfBlocks* present,
                             int64_t present_count, const int32_t* codes, const A* scale, double* sums,
                             int64_t stride, int64_t pixels) {
  constexpr int kTogether = 8;  // chains of additions, enough to hide how long one takes
  int64_t c = 0;
  for (; c + kTogether <= d; c += kTogether) {
    // behind the last channels the first of the tile that mostly comes next
    const S* ahead = c + 2 * kTogether <= d ? z + (c + kTogether) * channel : z + pixels;
    add_some_channels<S, A, kTogether, kScaled>(z + c * channel, channel, blocks, present, present_count, codes, scale,
                                                sums + c, stride, ahead, pixels);
  }
  for (; c < d; ++c) {
    add_some_channels<S, A, 1, kScaled>(z + c * channel, channel, blocks, present, present_count, codes, scale,
                                        sums + c, stride, nullptr, pixels);
  }
}

template <typename S, typename A>
void add_blocks(const S* z, int64_t channel, int64_t d, const Block* blocks, const ClassOfBlocks* present,
                int64_t present_count, const int32_t* codes, const A* scale, double* sums, int64_t stride,
                int64_t pixels) {
  if (scale != nullptr) {
    add_all_channels<S, A, true>(z, channel, d, blocks, present, present_count, codes, scale, sums, stride, pixels);
  } else {
    add_all_channels<S, A, false>(z, channel, d, blocks, present, present_count, codes, scale, sums, stride, pixels);
  }
}

// sum_k += v where the code is label_k, for some classes and channels at once.
template <typename A, int kChannels>
inline void add_masked(const Mask<A>& codes, const int32_t* labels, const Vector<A> (&v)[kChannels],
                       Vector<A> (&sums)[kChannels][kStreamClasses]) {
#pragma GCC unroll 8
  for (int k = 0; k < kStreamClasses; ++k) {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) {
      const __mmask16 mask = _mm512_cmpeq_epi32_mask((__m512i)codes, _mm512_set1_epi32(labels[k]));
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) {
        sums[c][k] = _mm512_mask_add_ps(sums[c][k], mask, sums[c][k], v[c]);
      }
      continue;
    }
#endif
    const Mask<A> mask = codes == labels[k];
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
      sums[c][k] += (Vector<A>)((Mask<A>)v[c] & mask);
    }
  }
}

// The codes of a block as wide as accumulators.
template <typename A>
inline Mask<A> wide_codes(const int32_t* codes) {
  const auto narrow = load_raw<typename VectorOf<A>::codes>(codes);
  if constexpr (sizeof(A) == 4) {
    return narrow;
  } else {
    return __builtin_convertvector(narrow, Mask<A>);
  }
}

template <typename S, typename A, int kChannels, bool kScaled>
inline void stream_channels(const S* z, int64_t channel, int64_t count, const ClassOfBlocks* present,
                            int64_t present_count, const int32_t* codes, const A* scale, double* sums,
                            int64_t stride) {
  constexpr int64_t kAhead = kStreamAheadBytes / static_cast<int64_t>(sizeof(S));
  for (int64_t first = 0; first < present_count; first += kStreamClasses) {
    const int64_t group = present_count - first < kStreamClasses ? present_count - first : kStreamClasses;
    int32_t labels[kStreamClasses];
    for (int64_t k = 0; k < kStreamClasses; ++k) {
      labels[k] = k < group ? present[first + k].label : INT32_MIN;  // the code of no pixel
    }
    for (int64_t begin = 0; begin < count; begin += kStreamTerms * kLanes<A>) {
      const int64_t end = begin + kStreamTerms * kLanes<A> < count ? begin + kStreamTerms * kLanes<A> : count;
      Vector<A> totals[kChannels][kStreamClasses] = {};
      int64_t i = begin;
      for (; i + kLanes<A> <= end; i += kLanes<A>) {
        Vector<A> block[kChannels];
#pragma GCC unroll 4
        for (int c = 0; c < kChannels; ++c) {
          __builtin_prefetch(z + c * channel + i + kAhead);
          block[c] = load(z + c * channel + i);
          if constexpr (kScaled) {
            block[c] *= load(scale + i);
          }
        }
        add_masked<A, kChannels>(wide_codes<A>(codes + i), labels, block, totals);
      }
      if (i < end) {
        Vector<A> block[kChannels];
        for (int c = 0; c < kChannels; ++c) {
          block[c] = load_some<A>(z + c * channel + i, end - i);
          if constexpr (kScaled) {
            block[c] *= load_some<A>(scale + i, end - i);
          }
        }
        int32_t rest[kLanes<A>];
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
          rest[lane] = i + lane < end ? codes[i + lane] : -1;
        }
        add_masked<A, kChannels>(wide_codes<A>(rest), labels, block, totals);
      }
      for (int64_t k = 0; k < group; ++k) {
        for (int c = 0; c < kChannels; ++c) {
          sums[labels[k] * stride + c] += static_cast<double>(total<A>(totals[c][k]));
        }
      }
    }
  }
}

template <typename S, typename A, bool kScaled>
inline void stream_all_channels(const S* z, int64_t channel, int64_t count, int64_t d, const ClassOfBlocks* present,
                                int64_t present_count, const int32_t* codes, const A* scale, double* sums,
                                int64_t stride) {
  int64_t c = 0;
  for (; c + kStreamChannels <= d; c += kStreamChannels) {
    stream_channels<S, A, kStreamChannels, kScaled>(z + c * channel, channel, count, present, present_count, codes,
                                                    scale, sums + c, stride);
  }
  for (; c < d; ++c) {
    stream_channels<S, A, 1, kScaled>(z + c * channel, channel, count, present, present_count, codes, scale, sums + c,
                                      stride);
  }
}

template <typename S, typename A>
void add_streams(const S* z, int64_t channel, int64_t count, int64_t d, const ClassOfBlocks* present,
                 int64_t present_count, const int32_t* codes, const A* scale, double* sums, int64_t stride) {
  if (scale != nullptr) {
    stream_all_channels<S, A, true>(z, channel, count, d, present, present_count, codes, scale, sums, stride);
  } else {
    stream_all_channels<S, A, false>(z, channel, count, d, present, present_count, codes, scale, sums, stride);
  }
}

template <typename S, typename A>
void add_pixels(const S* z, int64_t pixel, int64_t count, int64_t d, const int32_t* codes, const A* scale,
                const A* norms, A* sums, A* squares) {
  for (int64_t i = 0; i < count; ++i) {
    const S* row = z + i * pixel;
    A* to = sums + codes[i] * d;
    const Vector<A> factor = all<Vector<A>>(scale != nullptr ? scale[i] : A(1));
    int64_t c = 0;
    for (; c + kLanes<A> <= d; c += kLanes<A>) {
      __builtin_prefetch(reinterpret_cast<const char*>(row + c) + kAheadBytes);
      store(to + c, load(to + c) + factor * load(row + c));
    }
    if (c < d) {
      store_some<A>(to + c, d - c, load_some<A>(to + c, d - c) + factor * load_some<A>(row + c, d - c));
    }
    if (norms != nullptr) {
      squares[codes[i]] += norms[i];
    }
  }
}

template <typename A>
void flush(A* sums, int64_t count, double* totals) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    totals[i] += static_cast<double>(sums[i]);
    sums[i] = 0;
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

// out_i = table[code_i]. Where the table fits into registers one instruction picks a block's elements.
template <typename U>
void pick(const U* table, [[maybe_unused]] int64_t classes, const int32_t* codes, int64_t count, U* out) {
  int64_t i = 0;
#if defined(__AVX512F__) || defined(__AVX2__)
  if constexpr (sizeof(U) <= 4) {
    if (classes + 1 <= kPermuted) {
#if defined(__AVX512F__)
      __m512i all;
      if constexpr (sizeof(U) == 4) {
        all = _mm512_loadu_si512(table - 1);
      } else {
        all = _mm512_maskz_cvtepu16_epi32(kAllLanes, _mm256_loadu_si256((const __m256i*)(table - 1)));
      }
      for (; i + 16 <= count; i += 16) {
        const __m512i which = _mm512_add_epi32(_mm512_loadu_si512(codes + i), _mm512_set1_epi32(1));
        const __m512i picked = _mm512_maskz_permutexvar_epi32(kAllLanes, which, all);
        if constexpr (sizeof(U) == 4) {
          _mm512_storeu_si512(out + i, picked);
        } else {
          _mm256_storeu_si256((__m256i*)(out + i), _mm512_maskz_cvtepi32_epi16(kAllLanes, picked));
        }
      }
#else
      __m256i low, high;
      if constexpr (sizeof(U) == 4) {
        low = _mm256_loadu_si256((const __m256i*)(table - 1));
        high = _mm256_loadu_si256((const __m256i*)(table + 7));
      } else {
        low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(table - 1)));
        high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(table + 7)));
      }
      for (; i + 8 <= count; i += 8) {
        const __m256i which = _mm256_add_epi32(_mm256_loadu_si256((const __m256i*)(codes + i)), _mm256_set1_epi32(1));
        const __m256i above = _mm256_cmpgt_epi32(which, _mm256_set1_epi32(7));
        const __m256i picked = _mm256_blendv_epi8(_mm256_permutevar8x32_epi32(low, which),
                                                  _mm256_permutevar8x32_epi32(high, which), above);
        if constexpr (sizeof(U) == 4) {
          _mm256_storeu_si256((__m256i*)(out + i), picked);
        } else {
          const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(picked, picked), 0x08);
          _mm_storeu_si128((__m128i*)(out + i), _mm256_castsi256_si128(packed));
        }
      }
#endif
    }
  }
#endif
  for (; i < count; ++i) {
    out[i] = table[codes[i]];
  }
}

inline void pick_numbers(const float* table, int64_t classes, const int32_t* codes, int64_t count, float* out) {
  typedef uint32_t Alias __attribute__((may_alias));
  pick<Alias>((const Alias*)table, classes, codes, count, (Alias*)out);
}
inline void pick_numbers(const double* table, int64_t, const int32_t* codes, int64_t count, double* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = table[codes[i]];
  }
}

// Factors of dz = alpha g_k + beta z, a row z of class k with upstream gradients g_k and q_k:
//   plain:       alpha = 1,        beta = 2 q_k
//   normalised:  alpha = 1 / |z|,  beta = (2 q_k - du.u) / |z|^2,  du.u = g_k.z / |z| + 2 q_k |u|^2;  0 for a zero row
template <typename A>
inline void row_factors(A square, A projection, A q, bool normalize, A& alpha, A& beta) {
  const A norm = root(square);
  const A inverse = A(1) / (norm > A(kZeroNorm) ? norm : A(kZeroNorm));
  const A radial = inverse * projection + 2 * q * inverse * inverse * square;
  alpha = !normalize ? A(1) : norm > A(kZeroNorm) ? inverse : A(0);
  beta = !normalize ? 2 * q : alpha * alpha * (2 * q - radial);
}

template <typename S, typename A>
void gradient_pixels(const S* z, int64_t channel, int64_t count, int64_t d, const int32_t* codes, const A* by_channel,
                     int64_t pitch, const A* grad_squares, int64_t classes, bool normalize, A* scratch, A* out,
                     int64_t out_channel) {
  A *alpha = scratch, *beta = scratch + count, *g = scratch + 2 * count, *q = scratch + 3 * count;
  A* tile = scratch + 4 * count;  // channels a power of two apart share their places in a cache: it keeps a copy
  const int64_t whole = count / kLanes<A> * kLanes<A>;
  for (int64_t i = 0; i < 2 * count; ++i) {
    scratch[i] = 0;
  }
  // |z|^2 into alpha, g.z into beta
  for (int64_t c = 0; normalize && c < d; ++c) {
    pick_numbers(by_channel + c * pitch, classes, codes, count, g);
    const S* row = z + c * channel;
    A* copy = tile + c * count;
    for (int64_t i = 0; i < whole; i += kLanes<A>) {
      if (c + kAheadChannels < d) {
        __builtin_prefetch(row + kAheadChannels * channel + i);
      }
      const Vector<A> v = load(row + i);
      store(copy + i, v);
      store(alpha + i, load(alpha + i) + v * v);
      store(beta + i, load(beta + i) + v * load(g + i));
    }
    if (whole < count) {
      const int64_t left = count - whole;
      const Vector<A> v = load_some<A>(row + whole, left);
      store_some<A>(copy + whole, left, v);
      store_some<A>(alpha + whole, left, load_some<A>(alpha + whole, left) + v * v);
      store_some<A>(beta + whole, left, load_some<A>(beta + whole, left) + v * load_some<A>(g + whole, left));
    }
  }
  pick_numbers(grad_squares, classes, codes, count, q);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    A own_alpha, own_beta;
    row_factors(alpha[i], beta[i], q[i], normalize, own_alpha, own_beta);
    alpha[i] = own_alpha;
    beta[i] = own_beta;
  }
  for (int64_t c = 0; c < d; ++c) {
    pick_numbers(by_channel + c * pitch, classes, codes, count, g);
    const A* copy = tile + c * count;
    if (!normalize) {
      widen_all<S, A>(z + c * channel, count, tile);
      copy = tile;
    }
    A* to = out + c * out_channel;
    for (int64_t i = 0; i < whole; i += kLanes<A>) {
      const Vector<A> v = load(alpha + i) * load(g + i) + load(beta + i) * load(copy + i);
      store(to + i, (Vector<A>)((Mask<A>)v & ~lanes_of<A>(codes + i, -1)));
    }
    for (int64_t i = whole; i < count; ++i) {
      to[i] = codes[i] < 0 ? A(0) : alpha[i] * g[i] + beta[i] * copy[i];
    }
  }
}

template <typename S, typename A>
void gradient_channels(const S* z, int64_t pixel, int64_t count, int64_t d, const int32_t* codes, const A* by_class,
                       const A* grad_squares, bool normalize, A* out, int64_t out_pixel) {
  for (int64_t i = 0; i < count; ++i) {
    A* to = out + i * out_pixel;
    if (codes[i] < 0) {
      for (int64_t c = 0; c < d; ++c) {
        to[c] = 0;
      }
      continue;
    }
    const S* row = z + i * pixel;
    const A* g = by_class + codes[i] * d;
    Vector<A> squares = {}, products = {};
    for (int64_t c = 0; normalize && c < d; c += kLanes<A>) {
      const Vector<A> v = load_some<A>(row + c, d - c);
      squares += v * v;
      products += v * load_some<A>(g + c, d - c);
    }
    A alpha, beta;
    row_factors(total<A>(squares), total<A>(products), grad_squares[codes[i]], normalize, alpha, beta);
    for (int64_t c = 0; c < d; c += kLanes<A>) {
      store_some<A>(to + c, d - c, alpha * load_some<A>(g + c, d - c) + beta * load_some<A>(row + c, d - c));
    }
  }
}

// ---- on accumulators ------------------------------------------------------------------------------------------------

template <typename A>
void axpy(A alpha, const A* x, int64_t count, A* y) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    y[i] += alpha * x[i];
  }
}

template <typename A>
A dot(const A* a, const A* b, int64_t count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

template <typename S, typename A>
constexpr ClassSumsLoops<S, A> loops() {
  return {kLanes<A>,
          widen_all<S, A>,
          narrow_all<S, A>,
          norms_pixels<S, A>,
          norms_channels<S, A>,
          add_blocks<S, A>,
          add_streams<S, A>,
          add_pixels<S, A>,
          gradient_pixels<S, A>,
          gradient_channels<S, A>,
          blend<S, A>};
}

}  // namespace

extern const ClassSumsTable class_sums_table;
const ClassSumsTable class_sums_table = {
    {read_labels<uint8_t>, read_labels<int32_t>, read_labels<int64_t>, count_codes, find_blocks, pick<uint16_t>,
     pick<uint32_t>, pick<uint64_t>},
    {axpy<float>, dot<float>, unit_scales<float>, flush<float>},
    {axpy<double>, dot<double>, unit_scales<double>, flush<double>},
    loops<float, float>(),
    loops<double, double>(),
    loops<BFloat16Bits, float>(),
    loops<HalfBits, float>(),
};

}  // namespace in2nect::cpu::IN2NECT_CAPABILITY
