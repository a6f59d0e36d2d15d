// Features (B, d, h, w) and labels (B, H, W) as pointers and strides: any memory format, nothing copied.
#pragma once

#include <cstdint>

#include "../common/tensors.h"

namespace in2nect::cpu {

template <typename T>
struct Features {
  T* data;
  int64_t image, channel, row, column;  // strides

  T* at(int64_t b, int64_t y, int64_t x) const {
    return data + b * image + y * row + x * column;
  }
  // Which of the two inner loops walks memory: over channels (channels_last) or over pixels (contiguous).
  bool channels_inner() const {
    return channel < column;
  }
};

template <typename T>
Features<const T> view(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <typename T>
Features<T> mutable_view(const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

constexpr int32_t kSkip = -1;

class Labels {
 public:
  Labels(const Tensor& labels, int64_t classes, int64_t ignore_index)
      : data_(labels.const_data_ptr()),
        type_(labels.scalar_type()),
        image_(labels.stride(0)),
        row_(labels.stride(1)),
        column_(labels.stride(2)),
        classes_(classes),
        ignore_(ignore_index) {}

  const void* at(int64_t b, int64_t y, int64_t x) const {
    const int64_t bytes = type_ == ScalarType::Byte ? 1 : type_ == ScalarType::Int ? 4 : 8;
    return static_cast<const char*>(data_) + bytes * (b * image_ + y * row_ + x * column_);
  }
  ScalarType type() const {
    return type_;
  }
  int64_t row() const {
    return row_;
  }
  int64_t column() const {
    return column_;
  }

  // The classes of `count` pixels from (b, y, x) on; kSkip for a pixel that belongs to none.
  void read(int64_t b, int64_t y, int64_t x, int64_t count, int32_t* out) const {
    const int64_t offset = b * image_ + y * row_ + x * column_;
    switch (type_) {
      case ScalarType::Byte:
        return copy(static_cast<const uint8_t*>(data_) + offset, count, out);
      case ScalarType::Int:
        return copy(static_cast<const int32_t*>(data_) + offset, count, out);
      default:
        return copy(static_cast<const int64_t*>(data_) + offset, count, out);
    }
  }

 private:
  template <typename L>
  void copy(const L* labels, int64_t count, int32_t* out) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t label = static_cast<int64_t>(labels[i * column_]);
      const bool valid = label >= 0 && label < classes_ && label != ignore_;
      out[i] = valid ? static_cast<int32_t>(label) : kSkip;
    }
  }

  const void* data_;
  ScalarType type_;
  int64_t image_, row_, column_, classes_, ignore_;
};

}  // namespace in2nect::cpu
