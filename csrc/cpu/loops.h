// The loops of vector/class_sums.h that run on this CPU, by element and accumulator.
#pragma once

#include <type_traits>

#include "../common/tensors.h"
#include "capability.h"
#include "vector/class_sums.h"

namespace in2nect::cpu {

inline const ClassSumsTable& loops() {
#ifdef IN2NECT_X86
  if (capability() >= Capability::kAvx512) {
    return avx512::class_sums_table;
  }
  if (capability() >= Capability::kAvx2) {
    return avx2::class_sums_table;
  }
#endif
  return portable::class_sums_table;
}

// Elements as the loops know them.
template <typename T>
using Stored = std::conditional_t<
    std::is_same_v<T, torch::headeronly::BFloat16>, BFloat16Bits,
    std::conditional_t<std::is_same_v<T, torch::headeronly::Half>, HalfBits, T>>;

template <typename S>
const ClassSumsLoops<S, Accumulator<S>>& loops_of() {
  if constexpr (std::is_same_v<S, float>) {
    return loops().f32;
  } else if constexpr (std::is_same_v<S, double>) {
    return loops().f64;
  } else if constexpr (std::is_same_v<S, BFloat16Bits>) {
    return loops().bf16;
  } else {
    return loops().f16;
  }
}

template <typename A>
const ArithmeticLoops<A>& arithmetic() {
  if constexpr (std::is_same_v<A, double>) {
    return loops().a64;
  } else {
    return loops().a32;
  }
}

}  // namespace in2nect::cpu
