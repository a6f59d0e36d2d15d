// The most that the arithmetic units of one core do: for the bench, as a ceiling of what the kernels can reach.
#pragma once

#include <cstdint>

namespace in2nect::cpu {

// Independent chains of operations in registers, `rounds` of each; returns how many that was.
struct PeakLoops {
  int64_t (*multiply_adds)(int64_t rounds);  // of float32: two operations each
  int64_t (*multiply_adds_double)(int64_t rounds);
  int64_t (*exponentials)(int64_t rounds);  // the kernels' own
  int64_t (*exponentials_double)(int64_t rounds);
};

namespace portable {
extern const PeakLoops peak_loops;
}
#ifdef IN2NECT_X86
namespace avx2 {
extern const PeakLoops peak_loops;
}
namespace avx512 {
extern const PeakLoops peak_loops;
}
#endif

}  // namespace in2nect::cpu

// For Python, by ctypes: of the capability in force, on the calling thread.
extern "C" {
__attribute__((visibility("default"))) int64_t in2nect_multiply_adds(int float64, int64_t rounds);
__attribute__((visibility("default"))) int64_t in2nect_exponentials(int float64, int64_t rounds);
}
