// Which instructions the CPU has, and so which build of the vector kernels runs. The files in vector/ are compiled once
// a capability, each time in a namespace of its own, with nothing in them that a linker could merge across builds.
//
//   portable     what the compiler's own target has: SSE2 on x86-64, NEON on AArch64
//   avx2         AVX2 and FMA
//   avx512       AVX-512 F, BW, DQ, VL
//   avx512_bf16  and products of bfloat16 pairs
//   amx          and tiles of bfloat16
//   amx_emulated the same mathematics as amx without its instructions, slowly: for tests alone, on avx512_bf16
//
// IN2NECT_CPU_CAPABILITY names a lower one than the CPU has: for tests, and to compare.
#pragma once

#include <string>

namespace in2nect::cpu {

enum class Capability : int { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated };

// The one in force.
Capability capability();

}  // namespace in2nect::cpu

// For Python, by ctypes. The setter returns null, or why it refuses (in a buffer that the next call overwrites).
extern "C" {
__attribute__((visibility("default"))) const char* in2nect_cpu_capability();
__attribute__((visibility("default"))) const char* in2nect_set_cpu_capability(const char* name);
}
