// The names of csrc/cuda/device.h on the CPU: every thread of a block is a coroutine, which gives way at barriers, so
// that kernels run as they are written, one block after the other. Tensor-core instructions follow the fragment
// layouts of the PTX manual, written down here independently of the kernels: element by element. Asynchronous copies
// arrive when they are waited for and not before, and shared memory begins as NaN, so a missing wait or barrier shows.
// It is slow (some 30 us an instruction of a warp), and says nothing of speed, registers or memory ordering.
#pragma once

#include <math.h>  // the C names with C++'s overloads, as CUDA has them
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulated {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kWarp = 32, kLaneBytes = 64;

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) char lanes[kWarp][kLaneBytes];
};

struct Copy {
  void* to;
  const void* from;
  bool inside;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 index;
  bool done = false;
  const Barrier* awaited = nullptr;
  int64_t generation = 0;  // of the barrier, when this thread arrived
  std::vector<Copy> copies;

  bool runnable() const {
    return !done && (awaited == nullptr || awaited->generation != generation);
  }
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  ucontext_t scheduler;
  int current = 0;
  std::vector<uint64_t> shared;
  size_t shared_bytes = 0;
  dim3 index, grid;
  std::function<void()> kernel;
};

inline Block*& block() {
  static Block* running = nullptr;
  return running;
}

inline Thread& thread() {
  return block()->threads[block()->current];
}

inline void give_way() {
  swapcontext(&thread().context, &block()->scheduler);
}

inline void wait(Barrier& barrier, int threads) {
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  thread().awaited = &barrier;
  thread().generation = barrier.generation;
  give_way();
  thread().awaited = nullptr;
}

inline int lane() {
  return block()->current % kWarp;
}

// What every lane of the warp passes.
template <typename Value>
std::array<Value, kWarp> gather(const Value& own) {
  static_assert(sizeof(Value) <= kLaneBytes);
  Warp& warp = block()->warps[block()->current / kWarp];
  std::memcpy(warp.lanes[lane()], &own, sizeof(Value));
  wait(warp.barrier, kWarp);
  std::array<Value, kWarp> all;
  for (int i = 0; i < kWarp; ++i) {
    std::memcpy(&all[i], warp.lanes[i], sizeof(Value));
  }
  wait(warp.barrier, kWarp);
  return all;
}

inline void enter() {
  block()->kernel();
  thread().done = true;
  give_way();
}

[[gnu::noinline]] inline void prepare(Thread& thread, unsigned index) {
  thread.index = dim3(index, 0, 0);
  thread.done = false;
  thread.awaited = nullptr;
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
}

inline void run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  Block state;
  block() = &state;
  state.grid = grid;
  state.kernel = kernel;
  state.shared_bytes = shared_bytes;
  state.threads.resize(threads);
  state.warps.resize((threads + kWarp - 1) / kWarp);
  for (Thread& each : state.threads) {
    each.stack.reset(new char[kStackBytes]);
  }
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    state.index = dim3(i % grid.x, i / grid.x);
    state.shared.assign(shared_bytes / sizeof(uint64_t) + 1, ~uint64_t{0});
    for (unsigned t = 0; t < threads; ++t) {
      prepare(state.threads[t], t);
    }
    // A warp runs as far as it can before the next begins, as none would on a chip: what it should have waited for at a
    // barrier has not happened.
    for (bool any = true; any;) {
      any = false;
      for (unsigned warp = 0; warp < threads; warp += kWarp) {
        for (bool again = true; again;) {
          again = false;
          for (unsigned t = warp; t < warp + kWarp; ++t) {
            if (state.threads[t].runnable()) {
              state.current = static_cast<int>(t);
              swapcontext(&state.scheduler, &state.threads[t].context);
              again = any = true;
            }
          }
        }
      }
    }
  }
  block() = nullptr;
}

}  // namespace emulated

#define threadIdx (emulated::thread().index)
#define blockIdx (emulated::block()->index)
#define gridDim (emulated::block()->grid)

inline void __syncthreads() {
  emulated::wait(emulated::block()->barrier, static_cast<int>(emulated::block()->threads.size()));
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulated::gather(value)[lane];
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulated::gather(value)[emulated::lane() ^ distance];
}

inline bool __all_sync(unsigned, bool value) {
  bool all = true;
  for (bool each : emulated::gather(value)) {
    all = all && each;
  }
  return all;
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

namespace in2nect::cuda {

using Stream = void*;

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  emulated::run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

inline char* dynamic_shared() {
  return reinterpret_cast<char*>(emulated::block()->shared.data());
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float power_of_2(float x) {
  return x < -126 ? 0.0F : std::exp2(x);
}

inline double power_of_2(double x) {
  return std::exp2(x);
}

inline uint32_t pack_bfloat16(float low, float high) {
  return torch::headeronly::BFloat16(low).x | static_cast<uint32_t>(torch::headeronly::BFloat16(high).x) << 16;
}

inline float half_of(uint32_t bits) {
  return torch::headeronly::Half(static_cast<uint16_t>(bits), torch::headeronly::Half::from_bits());
}

inline float bfloat16_of(uint32_t bits) {
  return float_of(bits << 16);
}

inline float tf32_of(uint32_t bits) {
  return float_of(bits & 0xffffe000);
}

inline float low_half(uint32_t packed) {
  return half_of(packed & 0xffff);
}

inline float high_half(uint32_t packed) {
  return half_of(packed >> 16);
}

// 16 bytes at a multiple of 16 within what the launch asked for.
inline void check_shared(const void* row) {
  const auto& shared = emulated::block()->shared;
  const char* begin = reinterpret_cast<const char*>(shared.data());
  const auto offset = static_cast<const char*>(row) - begin;
  if (offset < 0 || offset % 16 != 0 || offset + 16 > static_cast<std::ptrdiff_t>(emulated::block()->shared_bytes)) {
    std::fprintf(stderr, "thread %u: shared memory at %td of %zu\n", emulated::thread().index.x, offset,
                 emulated::block()->shared_bytes);
    std::abort();
  }
}

inline void copy_16(void* shared, const void* global, bool inside) {
  check_shared(shared);
  emulated::thread().copies.push_back({shared, global, inside});
}

inline void await_copies() {
  for (const emulated::Copy& copy : emulated::thread().copies) {
    if (copy.inside) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  emulated::thread().copies.clear();
}

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  check_shared(row);
  const auto rows = emulated::gather(row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto* from = static_cast<const char*>(rows[matrix * 8 + emulated::lane() / 4]);
    std::memcpy(&to[matrix], from + emulated::lane() % 4 * 4, 4);
  }
}

inline void load_transposed(uint32_t (&to)[4], const void* row) {
  check_shared(row);
  const auto rows = emulated::gather(row);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const auto* from = static_cast<const char*>(rows[matrix * 8 + emulated::lane() % 4 * 2 + i]);
      std::memcpy(&pair[i], from + emulated::lane() / 4 * 2, 2);
    }
    to[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

// Tensor cores add exact products and round a sum in float32 towards zero.
inline float round_to_zero(double x) {
  const auto nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0F) : nearest;
}

struct Operands {
  uint32_t a[4], b[2];
};

// PTX manual, "Matrix fragments for mma.m16n8k16 with floating point type": a_i of lane l is row l / 4 (+ 8 for i in
// 2, 3, 6, 7), column 2 (l % 4) + i % 2 (+ 8 for i >= 4); b_i is row 2 (l % 4) + i % 2 (+ 8 for i >= 2), column l / 4.
template <typename Element>
void multiply_16(float (&c)[4], const Operands& own, const Element& element) {
  const auto all = emulated::gather(own);
  for (int i = 0; i < 4; ++i) {
    const int row = emulated::lane() / 4 + i / 2 * 8, column = emulated::lane() % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2] >> k % 2 * 16 & 0xffff;
      const uint32_t b = all[column * 4 + k % 8 / 2].b[k / 8] >> k % 2 * 16 & 0xffff;
      sum += static_cast<double>(element(a)) * element(b);
    }
    c[i] = round_to_zero(sum);
  }
}

inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_16(c, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, bfloat16_of);
}

inline void multiply_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_16(c, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, half_of);
}

// "mma.m16n8k8" with .tf32: a_i is row l / 4 (+ 8 for i in 1, 3), column l % 4 (+ 4 for i >= 2); b_i is row
// l % 4 + 4 i, column l / 4.
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto all = emulated::gather(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  for (int i = 0; i < 4; ++i) {
    const int row = emulated::lane() / 4 + i / 2 * 8, column = emulated::lane() % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 8; ++k) {
      const double a = tf32_of(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]);
      sum += a * tf32_of(all[column * 4 + k % 4].b[k / 4]);
    }
    c[i] = round_to_zero(sum);
  }
}

// "mma.m8n8k4" with .f64: a is row l / 4, column l % 4; b is row l % 4, column l / 4; c_i is row l / 4, column
// 2 (l % 4) + i.
inline void multiply_double(double& c0, double& c1, double a, double b) {
  const auto all = emulated::gather(std::array<double, 2>{a, b});
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 4; ++k) {
      (i == 0 ? c0 : c1) += all[emulated::lane() / 4 * 4 + k][0] * all[(emulated::lane() % 4 * 2 + i) * 4 + k][1];
    }
  }
}

}  // namespace in2nect::cuda
