// Huge pages for large results. glibc maps every block beyond 32 MiB afresh and gives it back when it is freed, so the
// first write to each page of such a tensor is a fault: 4 KiB at a time they cost several times what the writing does.
// The advice changes nothing but that; where the kernel takes none (transparent_hugepage: never) it costs nothing.
#pragma once

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace in2nect::cpu {

// Advises the huge pages that lie wholly inside [data, data + bytes); to be called before the first write.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kAlwaysMapped = int64_t{32} << 20;  // glibc's largest M_MMAP_THRESHOLD
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;   // on x86-64 and, with pages of 4 KiB, on AArch64
  if (bytes < kAlwaysMapped) {
    return;
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace in2nect::cpu
