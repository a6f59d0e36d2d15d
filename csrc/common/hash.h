// The hash by which sample_pixels draws: a pixel belongs to the sample if few pixels of its class hash lower.
//
//   hash(seed, step, i) = mix(stream + g (i + 1)) >> 1,   stream = mix(seed + g (step + 1)),
//
// g and mix those of SplitMix64 (Steele, Lea, Flood 2014). All modulo 2^64: negative seeds are as good as others.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define IN2NECT_HOST_DEVICE __host__ __device__
#else
#define IN2NECT_HOST_DEVICE
#endif

namespace in2nect {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

IN2NECT_HOST_DEVICE inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

IN2NECT_HOST_DEVICE inline uint64_t hash_stream(int64_t seed, int64_t step) {
  return mix(static_cast<uint64_t>(seed) + kGolden * (static_cast<uint64_t>(step) + 1));
}

// Below 2^63, so that it is the same number as a signed integer.
IN2NECT_HOST_DEVICE inline uint64_t hash_pixel(uint64_t stream, int64_t i) {
  return mix(stream + kGolden * (static_cast<uint64_t>(i) + 1)) >> 1;
}

}  // namespace in2nect
