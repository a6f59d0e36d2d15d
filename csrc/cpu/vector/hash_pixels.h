// The hashes of neighbouring pixels, by the build for this CPU; see ../capability.h.
#pragma once

#include <cstdint>

#include "../capability.h"

namespace in2nect::cpu {

using HashPixels = void(uint64_t stream, int64_t first, int64_t count, uint64_t* out);

namespace portable {
HashPixels hash_pixels;
}
namespace avx2 {
HashPixels hash_pixels;
}
namespace avx512 {
HashPixels hash_pixels;
}

inline HashPixels* best_hash_pixels() {
#ifdef IN2NECT_X86
  if (capability() >= Capability::kAvx512) {
    return avx512::hash_pixels;
  }
  if (capability() >= Capability::kAvx2) {
    return avx2::hash_pixels;
  }
#endif
  return portable::hash_pixels;
}

}  // namespace in2nect::cpu
