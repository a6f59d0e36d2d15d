// The CPU's instructions, asked once; see capability.h.
#include "capability.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "vector/peak.h"

#if defined(IN2NECT_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace in2nect::cpu {
namespace {

constexpr std::array<const char*, 6> kNames = {"portable", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"};
constexpr int kUnknown = -1;

#ifdef IN2NECT_X86
// Linux gives a process the tile registers when it asks (arch_prctl, since 5.16).
bool tiles_granted() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// CPUID leaf 7: AMX-TILE and AMX-BF16; compilers' own names for them are too new to rely on.
bool has_amx() {
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (d >> 24 & 1) != 0 && (d >> 22 & 1) != 0;
}

Capability detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Capability::kPortable;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Capability::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) {
    return Capability::kAvx512;
  }
  return has_amx() && tiles_granted() ? Capability::kAmx : Capability::kAvx512Bf16;
}
#else
Capability detect() {
  return Capability::kPortable;
}
#endif

Capability best() {
  static const Capability found = detect();
  return found;
}

std::atomic<int> chosen{kUnknown};

// Null, or why `name` cannot be chosen.
const char* choose(std::string_view name) {
  static std::string refusal;
  const std::string known = "portable, avx2, avx512, avx512_bf16, amx or amx_emulated";
  for (size_t i = 0; i < kNames.size(); ++i) {
    if (name == kNames[i]) {
      const Capability wanted = static_cast<Capability>(i);
      const Capability needed = wanted == Capability::kAmxEmulated ? Capability::kAvx512Bf16 : wanted;
      if (needed <= best()) {
        chosen = static_cast<int>(i);
        return nullptr;
      }
      refusal = "this CPU has " + std::string(kNames[static_cast<int>(best())]) + " at most, got " + std::string(name);
      return refusal.c_str();
    }
  }
  refusal = "expected " + known + ", got '" + std::string(name) + "'";
  return refusal.c_str();
}

}  // namespace

Capability capability() {
  if (chosen == kUnknown) {
    const char* wanted = std::getenv("IN2NECT_CPU_CAPABILITY");
    if (wanted == nullptr || *wanted == '\0') {
      chosen = static_cast<int>(best());
    } else if (const char* refusal = choose(wanted)) {
      throw std::runtime_error(std::string("IN2NECT_CPU_CAPABILITY: ") + refusal);
    }
  }
  return static_cast<Capability>(chosen.load());
}

}  // namespace in2nect::cpu

const char* in2nect_cpu_capability() {
  using namespace in2nect::cpu;
  try {
    return kNames[static_cast<int>(capability())];
  } catch (const std::exception& error) {
    static std::string message;
    message = error.what();
    return message.c_str();
  }
}

const char* in2nect_set_cpu_capability(const char* name) {
  using namespace in2nect::cpu;
  if (name == nullptr || *name == '\0') {
    chosen = kUnknown;  // back to the variable, or the best
    return nullptr;
  }
  return choose(name);
}

namespace {

const in2nect::cpu::PeakLoops& peak_loops() {
  using namespace in2nect::cpu;
#ifdef IN2NECT_X86
  if (capability() >= Capability::kAvx512) {
    return avx512::peak_loops;
  }
  if (capability() >= Capability::kAvx2) {
    return avx2::peak_loops;
  }
#endif
  return portable::peak_loops;
}

}  // namespace

int64_t in2nect_multiply_adds(int float64, int64_t rounds) {
  return float64 != 0 ? peak_loops().multiply_adds_double(rounds) : peak_loops().multiply_adds(rounds);
}

int64_t in2nect_exponentials(int float64, int64_t rounds) {
  return float64 != 0 ? peak_loops().exponentials_double(rounds) : peak_loops().exponentials(rounds);
}
