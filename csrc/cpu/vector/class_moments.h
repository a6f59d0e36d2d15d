// The inner loops of class_moments, compiled once a capability (../capability.h). Raw pointers alone, as in
// class_sums.h of this folder.
//
// Rows lie channels first: number c of pixel (or cell) x at t[c * pitch + x]. "Pairs" are five numbers a cell, of it and
// itself, its right, lower and lower right neighbours, and of its right and its lower neighbour with each other, each a
// row of `pitch` numbers: what a quadratic form of bilinearly interpolated rows is made of.
#pragma once

#include <cstdint>

namespace in2nect::cpu {

// Rows of these loops may be read and written up to the next multiple of so many numbers.
constexpr int64_t kMomentsPad = 32;
enum Pair : int { kSelf, kRight, kDown, kDiagonal, kAcross, kPairs };

// What the pixels of a stage are given and give. Codes are the classes' places among the present ones, -1 for a pixel of
// none; tables by class have a row before theirs.
template <typename A>
struct MomentsPixels {
  int64_t count, pitch, pairs_pitch;  // from row to row below
  const int32_t* codes;
  const double* squares;  // |z|^2
  const A* numbers;       // z.(row): of the centres, then (gradient) of the constants
  const A* const* forms;  // z^T V z: of the curvatures, then (gradient) of the matrices
  A *alpha, *unit_squares, *softmax;  // scratch: 1 / |z|, |u|^2, a row a class
  A* linear;              // results: what the row z is to be multiplied by in each sum that is linear in it ...
  A* pairs;               // ... and in each that is quadratic
};

// Of each present class.
template <typename A>
struct MomentsClasses {
  int64_t number;
  const A *weights, *anchors, *scales, *own;
};

template <typename A>
struct ClassMomentsLoops {
  // to[c * pitch + r] = from[r * stride + c], r < rows, c < columns
  void (*transpose)(const A* from, int64_t stride, int64_t rows, int64_t columns, A* to, int64_t pitch);
  // out[i][x] (+)= sum_k a[i * row + k * step] b[k][x], i < m, k < depth
  void (*inner)(const A* a, int64_t row, int64_t step, int64_t m, int64_t depth, const A* b, int64_t b_pitch,
                int64_t count, A* out, int64_t out_pitch, bool accumulate);
  // out[i * stride + j] += sum_x a[i][x] b[j][x]; `triangle`: not where j lies before i's block
  void (*outer)(const A* a, int64_t a_pitch, int64_t m, const A* b, int64_t b_pitch, int64_t n, int64_t count,
                double* out, int64_t stride, bool triangle);
  // out[c][x] (+)= sum_t coefficients[t][x] rows[t][c][x]
  void (*combine)(const A* const* coefficients, const A* const* rows, int64_t terms, int64_t pitch, int64_t d,
                  int64_t count, A* out, int64_t out_pitch);

  // Pairs of z with y, whose next row of cells is `below` further, in double (products of floats are exact there) ...
  void (*gram)(const A* z, int64_t below, int64_t pitch, int64_t d, int64_t count, double* out, int64_t out_pitch);
  // ... and of z with y = V z, V symmetric.
  void (*forms)(const A* z, const A* y, int64_t below, int64_t pitch, int64_t d, int64_t count, A* out,
                int64_t out_pitch);

  // A label row at `t` of the way from one row of cells to the next, `below` further, cell by cell: numbers, pairs ...
  void (*blend)(const A* cells, int64_t below, A t, int64_t count, A* out);
  void (*blend_gram)(const double* pairs, int64_t pitch, int64_t below, double t, int64_t count, double* self,
                     double* right);
  void (*blend_forms)(const A* pairs, int64_t pitch, int64_t below, A t, int64_t count, A* self, A* right);
  // ... then pixel by pixel, each at `weight` of the way from cell `lower` to the next.
  void (*interpolate)(const A* cells, const int32_t* lower, const A* weight, int64_t count, A* out);
  void (*interpolate_gram)(const double* self, const double* right, const int32_t* lower, const A* weight,
                           int64_t count, double* out);
  void (*interpolate_forms)(const A* self, const A* right, const int32_t* lower, const A* weight, int64_t count,
                            A* out);
  // The way back. Pixels begin[j] .. begin[j + 1] lie between cells j and j + 1.
  void (*gather)(const A* values, const A* weight, const int32_t* begin, int64_t cells, A* out);
  void (*gather_pairs)(const A* values, const A* weight, const int32_t* begin, int64_t cells, A* self, A* right);
  void (*spread)(const A* row, int64_t below, A t, int64_t count, A* cells);
  void (*spread_pairs)(const A* self, const A* right, int64_t pitch, int64_t below, A t, int64_t count, A* pairs);

  // The stages, pixel by pixel. Linear rows: alpha, then if asked 1, by class. Pairs: w alpha^2, of all classes or each.
  // squares[k] += |u|^2, unless null.
  void (*moments)(const MomentsPixels<A>& pixels, const MomentsClasses<A>& classes, bool sums, bool by_class,
                  double* squares);
  // Linear rows: a p_k alpha; pairs, by class: a p_k alpha^2. Returns sum a LSE if asked, else 0.
  double (*mixtures)(const MomentsPixels<A>& pixels, const MomentsClasses<A>& classes, bool by_class, bool sum);
  // Linear rows: a p_k alpha, then alpha by class, then if asked 1 by class. Pairs: alpha^2 (own - du.u), which z itself
  // is multiplied by, then 2 a p_k alpha^2 of each curvature, and scales alpha^2 of each class's matrix or the one.
  void (*gradient)(const MomentsPixels<A>& pixels, const MomentsClasses<A>& classes, bool sums, bool by_class);
};

struct ClassMomentsTable {
  ClassMomentsLoops<float> f32;
  ClassMomentsLoops<double> f64;
};

namespace portable {
extern const ClassMomentsTable class_moments_table;
}
#ifdef IN2NECT_X86
namespace avx2 {
extern const ClassMomentsTable class_moments_table;
}
namespace avx512 {
extern const ClassMomentsTable class_moments_table;
}
#endif

}  // namespace in2nect::cpu
