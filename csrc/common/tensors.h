// What every operator of csrc/ needs of a call: checks whose messages carry no path of the machine that built the
// library, the dtypes, and their accumulators. Host code only.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace in2nect {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A row no longer than this counts as zero: u = z / max(|z|, 1e-12), and its gradient is zero.
constexpr double kZeroNorm = 1e-12;

// bfloat16, float16 and float32 accumulate in float32, float64 in float64.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

inline ScalarType accumulator_type(ScalarType features) {
  return features == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) {
    return;
  }
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void require_labels(const char* name, ScalarType type) {
  require(type == ScalarType::Byte || type == ScalarType::Int || type == ScalarType::Long, name,
          ": labels must be uint8, int32 or int64, got ", torch::headeronly::toString(type),
          "; convert them with labels.long()");
}

// Calls function(T{}) with the C++ type of `type`; `name` is the operator's.
template <typename Function>
void dispatch_features(const char* name, ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::BFloat16:
      return function(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return function(torch::headeronly::Half{});
    default:
      require(false, name, ": features must be float32, float64, bfloat16 or float16, got ",
              torch::headeronly::toString(type));
  }
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace in2nect
