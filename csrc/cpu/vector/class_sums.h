// The inner loops of class_sums, compiled once a capability (../capability.h): the operator chooses one table of them
// when it runs. Raw pointers alone: what is included here must bring no code that a linker could merge across builds.
//
// `codes` are the classes of neighbouring pixels, -1 for a pixel that belongs to none; a table by class therefore has a
// row before its first. "Pixels inner" are features with adjacent pixels (NCHW), a stride from channel to channel;
// "channels inner" have adjacent channels (NHWC), a stride from pixel to pixel.
#pragma once

#include <cstdint>

namespace in2nect::cpu {

// bfloat16 and float16 as their bits: torch's own types bring inline functions along.
struct BFloat16Bits {
  uint16_t bits;
};
struct HalfBits {
  uint16_t bits;
};

// Some of `lanes` neighbouring pixels, from `pixel` on: those whose code, from `codes` on, is one class.
struct Block {
  int32_t pixel, codes;
};
// The blocks of one class in a tile: those from the last class's `end` up to this one's.
struct ClassOfBlocks {
  int32_t label, end;
};

// S: as stored; A: as accumulated, float or double.
template <typename S, typename A>
struct ClassSumsLoops {
  int64_t lanes;  // pixels of a block

  void (*widen)(const S* from, int64_t count, A* to);
  void (*narrow)(const A* from, int64_t count, S* to);

  // Squared norms of `count` pixels.
  void (*norms_pixels)(const S* z, int64_t channel, int64_t count, int64_t d, A* norms);
  void (*norms_channels)(const S* z, int64_t pixel, int64_t count, int64_t d, A* norms);

  // sums[k * stride + c] += sum of scale_i z_ci over the blocks of each class k, of a tile of
  // `pixels`; `scale` may be null.
  void (*add_blocks)(const S* z, int64_t channel, int64_t d, const Block* blocks, const ClassOfBlocks* present,
                     int64_t present_count, const int32_t* codes, const A* scale, double* sums, int64_t stride,
                     int64_t pixels);
  // The same by masks: each channel is read once a few classes, as it lies, whatever the runs of the labels. Faster
  // where not many classes are present; `end` is not used.
  void (*add_streams)(const S* z, int64_t channel, int64_t count, int64_t d, const ClassOfBlocks* present,
                      int64_t present_count, const int32_t* codes, const A* scale, double* sums, int64_t stride);
  // sums[code_i] += scale_i z_i, squares[code_i] += norms_i; `scale` and `norms` may be null. Row -1 gathers the rest.
  void (*add_pixels)(const S* z, int64_t pixel, int64_t count, int64_t d, const int32_t* codes, const A* scale,
                     const A* norms, A* sums, A* squares);

  // Gradient of a tile's rows, alpha_i g_k + beta_i z_i; see row_factors in class_sums.cpp of this folder.
  // Row c of `by_channel` is a table for pick, `pitch` behind the last; `scratch` holds (4 + d) x count.
  void (*gradient_pixels)(const S* z, int64_t channel, int64_t count, int64_t d, const int32_t* codes,
                          const A* by_channel, int64_t pitch, const A* grad_squares, int64_t classes, bool normalize,
                          A* scratch, A* out, int64_t out_channel);
  void (*gradient_channels)(const S* z, int64_t pixel, int64_t count, int64_t d, const int32_t* codes,
                            const A* by_class, const A* grad_squares, bool normalize, A* out, int64_t out_pixel);

  // out = low a + high b
  void (*blend)(const S* a, const S* b, A low, A high, int64_t count, A* out);
};

struct LabelLoops {
  // Codes of `count` labels; how many are neither a class nor the ignored one.
  int64_t (*bytes)(const uint8_t* labels, int64_t count, int64_t classes, int64_t ignore, int32_t* codes);
  int64_t (*ints)(const int32_t* labels, int64_t count, int64_t classes, int64_t ignore, int32_t* codes);
  int64_t (*longs)(const int64_t* labels, int64_t count, int64_t classes, int64_t ignore, int32_t* codes);
  // counts[code_i] += 1; four tables of `classes` + 1, each with a row before its first, `pitch` apart.
  void (*count)(const int32_t* codes, int64_t count, int32_t* counts, int64_t pitch);
  // The blocks of `count` pixels, class by class for the `classes` whose labels are in `present`, where `end` is filled
  // in. `codes` has room for two blocks behind the pixels, `blocks` for a block a pixel and `lanes` more.
  void (*find_blocks)(int32_t* codes, int64_t count, int64_t lanes, ClassOfBlocks* present, int64_t classes,
                      Block* blocks);
  // out_i = table[code_i] by bytes of an element; from table[-1] on kPermuted may be read.
  void (*pick16)(const uint16_t* table, int64_t classes, const int32_t* codes, int64_t count, uint16_t* out);
  void (*pick32)(const uint32_t* table, int64_t classes, const int32_t* codes, int64_t count, uint32_t* out);
  void (*pick64)(const uint64_t* table, int64_t classes, const int32_t* codes, int64_t count, uint64_t* out);
};
constexpr int64_t kPermuted = 16;  // elements of a table that one instruction or two pick from

// On accumulators.
template <typename A>
struct ArithmeticLoops {
  void (*axpy)(A alpha, const A* x, int64_t count, A* y);
  A (*dot)(const A* a, const A* b, int64_t count);
  // scale_i = 1 / max(|z_i|, 1e-12) from norms_i = |z_i|^2, which becomes |scale_i z_i|^2.
  void (*unit_scales)(A* norms, int64_t count, A* scale);
  // totals += sums, which become zero.
  void (*flush)(A* sums, int64_t count, double* totals);
};

struct ClassSumsTable {
  LabelLoops labels;
  ArithmeticLoops<float> a32;
  ArithmeticLoops<double> a64;
  ClassSumsLoops<float, float> f32;
  ClassSumsLoops<double, double> f64;
  ClassSumsLoops<BFloat16Bits, float> bf16;
  ClassSumsLoops<HalfBits, float> f16;
};

namespace portable {
extern const ClassSumsTable class_sums_table;
}
#ifdef IN2NECT_X86
namespace avx2 {
extern const ClassSumsTable class_sums_table;
}
namespace avx512 {
extern const ClassSumsTable class_sums_table;
}
#endif

}  // namespace in2nect::cpu
