// A tile of rows: values are (columns, rows), so that a vector holds one feature or unit of several rows.
#pragma once

#include "chain.h"
#include "monotone.h"
#include "splines.h"

namespace jacobiflow {

// Calls use(make), where make(parameters) returns the transform of one feature. `memory` is from `feature_memory`.
template <typename T, typename Use>
void with_feature_transform(const Transform& t, bool inverts, T* memory, const Use& use) {
  switch (t.kind) {
    case TransformKind::masked_affine: return use([&](const Parameters<T>& p) { return Affine<T>(t, p, inverts); });
    case TransformKind::bernstein: return use([&](const Parameters<T>& p) { return Bernstein<T>(t, p, inverts, memory); });
    case TransformKind::sum_of_squares:
      return use([&](const Parameters<T>& p) { return SumOfSquares<T>(t, p, inverts, memory); });
    default: return use([&](const Parameters<T>& p) { return Spline<T>(t, p, inverts, memory); });
  }
}

// Returns memory for two vectors of rows per bin of a spline, or per coefficient of a polynomial.
template <typename T>
Buffer<T> feature_memory(const ChainArgs& call) {
  int max_bins = 0;
  for (int i = 0; i < call.count; i++) max_bins = std::max(max_bins, call.transforms[i].bins);
  return Buffer<T>((size_t)2 * max_bins * Simd<T>::lanes);
}

// Returns memory (P, rows) for the parameters of a feature that are in tensors.
template <typename T>
Buffer<T> constant_memory(const ChainArgs& call, int rows) {
  int max_parameters = 0;
  for (int i = 0; i < call.count; i++)
    if (is_constant(call.transforms[i])) max_parameters = std::max(max_parameters, call.transforms[i].parameters);
  return Buffer<T>((size_t)max_parameters * rows);
}

// Copies (count, columns) to (columns, rows); rows beyond `count` repeat the first.
template <typename T>
void load_rows(const T* from, int64_t stride, int columns, int count, int rows, T* to) {
  for (int column = 0; column < columns; column++)
    for (int row = 0; row < rows; row++) to[(size_t)column * rows + row] = from[(row < count ? row : 0) * stride + column];
}

// Copies (columns, rows) to (count, columns).
template <typename T>
void store_rows(const T* from, int columns, int count, int rows, T* to) {
  for (int column = 0; column < columns; column++)
    for (int row = 0; row < count; row++) to[(int64_t)row * columns + column] = from[(size_t)column * rows + row];
}

// Moves feature order[f] to feature f, or back. `copy` is a buffer of the same size.
template <typename T>
void permute(const Transform& t, bool is_back, int rows, T* features, T* copy) {
  std::memcpy(copy, features, sizeof(T) * t.features * rows);
  for (int f = 0; f < t.features; f++) {
    const int from = is_back ? f : t.order[f], to = is_back ? t.order[f] : f;
    std::memcpy(features + (size_t)to * rows, copy + (size_t)from * rows, sizeof(T) * rows);
  }
}

}  // namespace jacobiflow
