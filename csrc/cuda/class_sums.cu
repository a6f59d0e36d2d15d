// CUDA twin of cpu/class_sums.cpp for labels on the features' own grid: per-class sums, counts and squares, and their
// gradient. Written to be right and plain: O(N d), any strides, 64-bit addresses, the current stream, no host
// synchronisation. Where it is slow (contiguous features in the forward, channels_last in the backward) the Triton
// kernels are the answer.
//
// Determinism: pixels are cut into slots by their number alone; one thread owns one channel of one slot and adds in
// order, a second kernel adds the slots in a fixed order, in double. Counts are integers, whose atomic sums do not
// depend on order. There are no floating-point atomics.
#include "class_sums.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../common/class_sums.h"
#include "stream.h"

namespace in2nect::cuda {
namespace {

constexpr int kThreads = 256;
// Pixels a slot holds at least, so that its K x d partial sums are worth writing.
constexpr int64_t kSlotPixels = 1024;
// Slots at most: 2048 x K x d partial sums are 3.5 MiB at K = 7, d = 64, and fill every multiprocessor many times over.
constexpr int64_t kMaxSlots = 2048;
// Terms a register sums before it goes to the slot: bounds the rounding of float32 sums.
constexpr int kRegisterTerms = 64;
// The second kernel: columns of one warp, and warps that share the slots of a column.
constexpr int kColumns = 32, kSlotLanes = 8;

constexpr int64_t kSkip = -1;

template <typename T>
struct Features {
  T* data;
  int64_t image, channel, row, column;  // strides
};

struct Labels {
  const void* data;
  ScalarType type;
  int64_t image, row, column;  // strides
  int64_t classes, ignore_index;
};

// Pixels are numbered b, y, x in row-major order.
struct Pixels {
  int64_t height, width, total;
};

struct Place {
  int64_t image, row, column;
};

__device__ Place place(const Pixels& pixels, int64_t i) {
  const int64_t row = i / pixels.width;
  return {row / pixels.height, row % pixels.height, i % pixels.width};
}

template <typename T>
__device__ T* address(const Features<T>& z, const Place& p) {
  return z.data + p.image * z.image + p.row * z.row + p.column * z.column;
}

__device__ int64_t class_of(const Labels& labels, const Place& p) {
  const int64_t offset = p.image * labels.image + p.row * labels.row + p.column * labels.column;
  int64_t label;
  if (labels.type == ScalarType::Byte) {
    label = static_cast<const uint8_t*>(labels.data)[offset];
  } else if (labels.type == ScalarType::Int) {
    label = static_cast<const int32_t*>(labels.data)[offset];
  } else {
    label = static_cast<const int64_t*>(labels.data)[offset];
  }
  return label >= 0 && label < labels.classes && label != labels.ignore_index ? label : kSkip;
}

template <typename A>
__device__ A inverse_norm(A square) {
  return A(1) / max(sqrt(square), static_cast<A>(kZeroNorm));
}

// Per pixel: scale = 1 / |z| (or 1) and square = |row|^2; either output may be null. One thread a pixel.
template <typename T>
__global__ void row_norms(Features<const T> z, Pixels pixels, int64_t d, bool normalize, Accumulator<T>* scale,
                          Accumulator<T>* square) {
  using A = Accumulator<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= pixels.total) {
    return;
  }
  const T* row = address(z, place(pixels, i));
  A norm = 0;
  for (int64_t c = 0; c < d; ++c) {
    const A value = static_cast<A>(row[c * z.channel]);
    norm += value * value;
  }
  const A inverse = normalize ? inverse_norm(norm) : A(1);
  if (scale != nullptr) {
    scale[i] = inverse;
  }
  if (square != nullptr) {
    square[i] = norm * inverse * inverse;
  }
}

// partial[slot, k, c] = sum of the rows' channel c over the slot's pixels of class k; column d holds the squares.
// One thread owns one column of one slot; a register carries a run of one class.
template <typename T>
__global__ void slot_sums(Features<const T> z, Labels labels, Pixels pixels, int64_t d, int64_t columns, int64_t slots,
                          const Accumulator<T>* scale, const Accumulator<T>* square, Accumulator<T>* partial) {
  using A = Accumulator<T>;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t slot = thread / columns, c = thread % columns;
  if (slot >= slots) {
    return;
  }
  A* own = partial + slot * labels.classes * columns + c;  // stride `columns` from class to class
  const int64_t begin = slot * pixels.total / slots, end = (slot + 1) * pixels.total / slots;
  int64_t current = kSkip;
  int terms = 0;
  A total = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Place p = place(pixels, i);
    const int64_t k = class_of(labels, p);
    if (k != current || terms == kRegisterTerms) {
      if (current != kSkip) {
        own[current * columns] += total;
      }
      current = k;
      total = 0;
      terms = 0;
    }
    if (k != kSkip) {
      const A value = c < d ? static_cast<A>(address(z, p)[c * z.channel]) : square[i];
      total += c < d && scale != nullptr ? value * scale[i] : value;
      ++terms;
    }
  }
  if (current != kSkip) {
    own[current * columns] += total;
  }
}

// Adds the slots of each (class, column): kSlotLanes interleaved sums in double, then those in order.
template <typename A>
__global__ void add_slots(const A* partial, int64_t slots, int64_t classes, int64_t columns, int64_t d, A* sums,
                          A* squares) {
  __shared__ double lanes[kSlotLanes][kColumns];
  const int64_t entries = classes * columns;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  double total = 0;
  for (int64_t slot = threadIdx.y; entry < entries && slot < slots; slot += kSlotLanes) {
    total += static_cast<double>(partial[slot * entries + entry]);
  }
  lanes[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y != 0 || entry >= entries) {
    return;
  }
  total = 0;
  for (int lane = 0; lane < kSlotLanes; ++lane) {
    total += lanes[lane][threadIdx.x];
  }
  const int64_t k = entry / columns, c = entry % columns;
  (c < d ? sums[k * d + c] : squares[k]) = static_cast<A>(total);
}

// One thread a pixel slot of kRegisterTerms pixels; runs of one class cost one atomic each.
__global__ void count_labels(Labels labels, Pixels pixels, unsigned long long* counts) {
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kRegisterTerms;
  const int64_t end = min(begin + kRegisterTerms, pixels.total);
  int64_t current = kSkip;
  unsigned long long run = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t k = class_of(labels, place(pixels, i));
    if (k != current) {
      if (current != kSkip) {
        atomicAdd(counts + current, run);
      }
      current = k;
      run = 0;
    }
    ++run;
  }
  if (current != kSkip) {
    atomicAdd(counts + current, run);
  }
}

template <typename A>
struct Upstream {
  const A* sums;     // (K, d) with the strides below, or null
  const A* squares;  // (K,), or null
  int64_t class_stride, channel_stride, square_stride;
};

// dz = alpha g_k + beta z, as in cpu/class_sums.cpp: plain alpha = 1, beta = 2 q_k; normalised alpha = 1 / |z|,
// beta = (2 q_k - du.u) / |z|^2; a zero row has a zero gradient. One thread a pixel.
template <typename T>
__global__ void row_gradients(Features<const T> z, Labels labels, Pixels pixels, int64_t d,
                              Upstream<Accumulator<T>> upstream, bool normalize, Features<T> gradient) {
  using A = Accumulator<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= pixels.total) {
    return;
  }
  const Place p = place(pixels, i);
  const int64_t k = class_of(labels, p);
  T* out = address(gradient, p);
  if (k == kSkip) {
    for (int64_t c = 0; c < d; ++c) {
      out[c * gradient.channel] = static_cast<T>(A(0));
    }
    return;
  }
  const T* row = address(z, p);
  const A* g = upstream.sums == nullptr ? nullptr : upstream.sums + k * upstream.class_stride;
  const A q = upstream.squares == nullptr ? A(0) : A(2) * upstream.squares[k * upstream.square_stride];
  A alpha = 1, beta = q;
  if (normalize) {
    A square = 0, projection = 0;
    for (int64_t c = 0; c < d; ++c) {
      const A value = static_cast<A>(row[c * z.channel]);
      square += value * value;
      projection += g == nullptr ? A(0) : value * g[c * upstream.channel_stride];
    }
    const A inverse = inverse_norm(square);
    alpha = sqrt(square) > static_cast<A>(kZeroNorm) ? inverse : A(0);
    beta = alpha * alpha * (q - inverse * projection - q * inverse * inverse * square);
  }
  const bool reads_features = normalize || upstream.squares != nullptr;
  for (int64_t c = 0; c < d; ++c) {
    const A from_sums = g == nullptr ? A(0) : alpha * g[c * upstream.channel_stride];
    const A from_row = reads_features ? beta * static_cast<A>(row[c * z.channel]) : A(0);
    out[c * gradient.channel] = static_cast<T>(from_sums + from_row);
  }
}

// ---- host -----------------------------------------------------------------------------------------------------------

template <typename T>
Features<const T> view(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <typename T>
Features<T> mutable_view(const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Labels view_labels(const Tensor& t, int64_t classes, int64_t ignore_index) {
  return {t.const_data_ptr(), t.scalar_type(), t.stride(0), t.stride(1), t.stride(2), classes, ignore_index};
}

void require_same_grid(const Shape& shape, const Tensor& features, const Tensor& labels) {
  require(shape.same_grid(), "class_sums: the cuda backend takes labels on the features' grid, got features of ",
          shape.height, " x ", shape.width, " and labels of ", shape.label_height, " x ", shape.label_width,
          "; use resolution=\"feature\", or the reference backend");
  require(features.get_device_index() == labels.get_device_index(), "class_sums: features are on cuda:",
          features.get_device_index(), " and labels on cuda:", labels.get_device_index(),
          "; move them to one device");
}

unsigned blocks(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

template <typename A>
A* data_or_null(const Tensor& t, bool used) {
  return used ? static_cast<A*>(t.mutable_data_ptr()) : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> class_sums(Tensor features, Tensor labels, int64_t num_classes,
                                              int64_t ignore_index, bool normalize, bool squares) {
  const Shape shape = checked_shape(features, labels, num_classes);
  require_same_grid(shape, features, labels);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const ScalarType type = accumulator_type(features.scalar_type());
  const Pixels pixels{shape.height, shape.width, shape.batch * shape.height * shape.width};
  const int64_t d = shape.channels, columns = d + (squares ? 1 : 0);
  const int64_t slots = std::clamp<int64_t>((pixels.total + kSlotPixels - 1) / kSlotPixels, 1, kMaxSlots);
  Tensor sums = torch::stable::new_zeros(features, {shape.classes, d}, type);
  Tensor counts = torch::stable::new_zeros(features, {shape.classes}, ScalarType::Long);
  Tensor square_sums = torch::stable::new_zeros(features, {squares ? shape.classes : 0}, type);
  if (pixels.total == 0 || columns == 0) {
    return {sums, counts, square_sums};
  }
  Tensor scale = torch::stable::new_empty(features, {normalize ? pixels.total : 0}, type);
  Tensor square = torch::stable::new_empty(features, {squares ? pixels.total : 0}, type);
  Tensor partial = torch::stable::new_zeros(features, {slots, shape.classes, columns}, type);
  const Labels codes = view_labels(labels, shape.classes, ignore_index);
  const cudaStream_t stream = current_stream(features);
  count_labels<<<blocks(pixels.total, int64_t{kThreads} * kRegisterTerms), kThreads, 0, stream>>>(
      codes, pixels, static_cast<unsigned long long*>(counts.mutable_data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  dispatch_features("class_sums", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    A* scales = data_or_null<A>(scale, normalize);
    A* row_squares = data_or_null<A>(square, squares);
    if (normalize || squares) {
      row_norms<T><<<blocks(pixels.total, kThreads), kThreads, 0, stream>>>(view<T>(features), pixels, d, normalize,
                                                                             scales, row_squares);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    A* partials = static_cast<A*>(partial.mutable_data_ptr());
    slot_sums<T><<<blocks(slots * columns, kThreads), kThreads, 0, stream>>>(
        view<T>(features), codes, pixels, d, columns, slots, scales, row_squares, partials);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    add_slots<A><<<blocks(shape.classes * columns, kColumns), dim3(kColumns, kSlotLanes), 0, stream>>>(
        partials, slots, shape.classes, columns, d, static_cast<A*>(sums.mutable_data_ptr()),
        data_or_null<A>(square_sums, squares));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {sums, counts, square_sums};
}

Tensor class_sums_backward(std::optional<Tensor> grad_sums, std::optional<Tensor> grad_squares, Tensor features,
                           Tensor labels, int64_t ignore_index, bool normalize) {
  const Shape shape = checked_shape(grad_sums, grad_squares, features, labels);
  require_same_grid(shape, features, labels);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Pixels pixels{shape.height, shape.width, shape.batch * shape.height * shape.width};
  Tensor gradient = torch::stable::empty_like(features);
  if (pixels.total == 0) {
    return gradient;
  }
  const Labels codes = view_labels(labels, shape.classes, ignore_index);
  const cudaStream_t stream = current_stream(features);
  dispatch_features("class_sums", features.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Upstream<A> upstream{};
    if (grad_sums) {
      upstream.sums = static_cast<const A*>(grad_sums->const_data_ptr());
      upstream.class_stride = grad_sums->stride(0);
      upstream.channel_stride = grad_sums->stride(1);
    }
    if (grad_squares) {
      upstream.squares = static_cast<const A*>(grad_squares->const_data_ptr());
      upstream.square_stride = grad_squares->stride(0);
    }
    row_gradients<T><<<blocks(pixels.total, kThreads), kThreads, 0, stream>>>(
        view<T>(features), codes, pixels, shape.channels, upstream, normalize, mutable_view<T>(gradient));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return gradient;
}

}  // namespace in2nect::cuda
