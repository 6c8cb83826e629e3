// A tile of rows: values are (columns, rows), so that a vector holds one feature or unit of several rows.
#pragma once

#include "monotone.h"
#include "splines.h"

namespace jacobiflow {

// Calls use(make), where make(parameters) returns the transform of one feature. `memory` has two vectors
// for each bin or coefficient.
template <typename T, typename Use>
void with_feature_transform(const Transform& t, bool inverts, T* memory, const Use& use) {
  if (t.kind == TransformKind::masked_affine) return use([&](const Parameters<T>& p) { return Affine<T>(t, p, inverts); });
  if (t.kind == TransformKind::bernstein)
    return use([&](const Parameters<T>& p) { return Bernstein<T>(t, p, inverts, memory); });
  if (t.kind == TransformKind::sum_of_squares)
    return use([&](const Parameters<T>& p) { return SumOfSquares<T>(t, p, inverts, memory); });
  use([&](const Parameters<T>& p) { return Spline<T>(t, p, inverts, memory); });
}

// Copies (count, columns) to (columns, rows); rows beyond `count` repeat the first.
template <typename T>
void load_rows(const T* from, int64_t stride, int columns, int count, int rows, T* to) {
  for (int column = 0; column < columns; column++)
    for (int row = 0; row < rows; row++)
      to[(size_t)column * rows + row] = from[(row < count ? row : 0) * stride + column];
}

// Copies (columns, rows) to (count, columns).
template <typename T>
void store_rows(const T* from, int columns, int count, int rows, T* to) {
  for (int column = 0; column < columns; column++)
    for (int row = 0; row < count; row++) to[(int64_t)row * columns + column] = from[(size_t)column * rows + row];
}

// Copies the values of units.
template <typename T>
void copy_units(const T* from, int units, int rows, T* to) {
  for (size_t i = 0; i < (size_t)units * rows; i += Simd<T>::lanes) Simd<T>::store(to + i, Simd<T>::load(from + i));
}

// Moves feature order[f] to feature f, or back. `copy` is a buffer of the same size.
template <typename T>
void permute(const Transform& t, bool is_back, int rows, T* features, T* copy) {
  copy_units(features, t.features, rows, copy);
  for (int f = 0; f < t.features; f++) {
    const int from = is_back ? f : t.order[f], to = is_back ? t.order[f] : f;
    copy_units(copy + (size_t)from * rows, 1, rows, features + (size_t)to * rows);
  }
}

}  // namespace jacobiflow
