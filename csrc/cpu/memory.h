// Fresh memory by huge pages: the first touch of 64 MiB costs 16,384 faults of 4 KiB, or 32 of 2 MiB.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace in2nect::cpu {

// Says that `bytes` at `data` will be written soon and in full. A hint, for where the system leaves it to programs
// (transparent_hugepage "madvise", most distributions' default); nothing where the memory is small or in use already.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLeast = 4 * 1024 * 1024;  // below, rounding to huge pages leaves little to gain
  constexpr uintptr_t kPage = 4096;
  if (bytes < kLeast) {
    return;
  }
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused: as before
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace in2nect::cpu
