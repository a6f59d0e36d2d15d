// The hash that `sample_pixels` draws by, for the CPU and the CUDA operator: SplitMix64's output function (Steele, Lea,
// Flood 2014) of a seed, a step and a pixel index, as reference.hash_pixels defines it. Costs some ten instructions.
#pragma once

#include <cstdint>

// `static`: each translation unit has a copy of its own, so that a build for one CPU never calls another's.
#ifdef __CUDACC__
#define IN2NECT_HASH __host__ __device__ static inline
#else
#define IN2NECT_HASH static inline
#endif

namespace in2nect {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;  // 2^64 / the golden ratio, odd
constexpr int kHashBits = 63;                     // so that a hash is a non-negative int64, as torch and Triton hold it

// A bijection of 64 bits.
IN2NECT_HASH uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * uint64_t{0xBF58476D1CE4E5B9};
  x = (x ^ (x >> 27)) * uint64_t{0x94D049BB133111EB};
  return x ^ (x >> 31);
}

// The state from which the hashes of one (seed, step) are made.
IN2NECT_HASH uint64_t hash_stream(int64_t seed, int64_t step) {
  return mix(static_cast<uint64_t>(seed) + kGolden * (static_cast<uint64_t>(step) + 1));
}

// 63 bits. At most two pixels of one stream share a hash: the 64 bits before the shift are a bijection of the index.
IN2NECT_HASH uint64_t hash_pixel(uint64_t stream, int64_t pixel) {
  return mix(stream + kGolden * (static_cast<uint64_t>(pixel) + 1)) >> 1;
}

}  // namespace in2nect

#undef IN2NECT_HASH
