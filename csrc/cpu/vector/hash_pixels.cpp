// hash_pixels, once a capability: the loop of ../../common/hash.h, which AVX-512 DQ multiplies eight pixels at a time in.
#include "hash_pixels.h"

#include "../../common/hash.h"

namespace in2nect::cpu::IN2NECT_CAPABILITY {

void hash_pixels(uint64_t stream, int64_t first, int64_t count, uint64_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    out[i] = hash_pixel(stream, first + i);
  }
}

}  // namespace in2nect::cpu::IN2NECT_CAPABILITY
