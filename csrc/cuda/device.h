// What the kernels ask of the chip beyond CUDA C++: tensor-core products, loads of their operands, asynchronous copies
// and the hardware's exponential, one PTX instruction each (sm_80 and later); and how a kernel is launched.
//
// With IN2NECT_EMULATED_DEVICE the same names come from tests/cuda_emulation, which runs the kernels on the CPU: so the
// files *_kernels.h are tested where there is no GPU.
#pragma once

#ifdef IN2NECT_EMULATED_DEVICE
#include "emulated_device.h"
#else

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace in2nect::cuda {

using Stream = cudaStream_t;

// Shared memory a kernel may have without asking for more.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, Stream stream,
            const Arguments&... arguments) {
  if (shared_bytes > kDefaultSharedBytes) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ inline uint32_t bits_of(float x) {
  return __float_as_uint(x);
}

__device__ inline float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}

// 2^x: two units in the last place for float32 (results below 2^-126 are 0), the library's for float64.
__device__ inline float power_of_2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ inline double power_of_2(double x) {
  return exp2(x);
}

// Two numbers, rounded to bfloat16, in one register; `low` in its lower half.
__device__ inline uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ inline float low_half(uint32_t packed) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(packed & 0xffff)));
}

__device__ inline float high_half(uint32_t packed) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(packed >> 16)));
}

// ---- copies from global to shared memory ----------------------------------------------------------------------------

// 16 bytes, or as many zeros; both addresses are multiples of 16.
__device__ inline void copy_16(void* shared, const void* global, bool inside) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

// Waits for every copy of this thread.
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- operands of the tensor cores -----------------------------------------------------------------------------------

// Four 8 x 16-byte matrices; lane l points to row l % 8 of matrix l / 8, and gets bytes 4 (l % 4) of row l / 4 of each.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// The same of 8 x 8 matrices of 16-bit numbers, transposed: lane l gets rows 2 (l % 4) and the next of column l / 4.
__device__ inline void load_transposed(uint32_t (&to)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

// ---- products c += a b, with the fragments of the PTX manual --------------------------------------------------------

__device__ inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 8 deep; of each operand's float32 the tensor core reads the upper 19 bits.
__device__ inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 8 x 8, 4 deep.
__device__ inline void multiply_double(double& c0, double& c1, double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(c0), "+d"(c1)
      : "d"(a), "d"(b));
}

}  // namespace in2nect::cuda

#endif
