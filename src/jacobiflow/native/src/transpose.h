// Transposes matrices in registers.
#pragma once

#include <utility>

#include "vector_math.h"

namespace jacobiflow {

// Exchanges lanes between `a` and `b`: those of `a` whose index has the bit `step`, and those of `b` whose index lacks it.
template <int step, typename Vector, int... i>
void exchange_lanes(Vector& a, Vector& b, std::integer_sequence<int, i...>) {
  constexpr int count = sizeof...(i);
  const Vector low = a, high = b;
  a = __builtin_shufflevector(low, high, (i & step ? count + i - step : i)...);
  b = __builtin_shufflevector(low, high, (i & step ? count + i : i + step)...);
}

// Transposes a square of vectors.
template <typename T, int step = 1>
void transpose(typename Simd<T>::Vector (&v)[Simd<T>::lanes]) {
  constexpr int count = Simd<T>::lanes;
  for (int k = 0; k < count; k++)
    if (!(k & step)) exchange_lanes<step>(v[k], v[k + step], std::make_integer_sequence<int, count>());
  if constexpr (2 * step < count) transpose<T, 2 * step>(v);
}

// Copies values (units, rows) to (rows, stride), whose columns from `units` on are 0; both sizes are whole vectors.
template <typename T>
void transpose(const T* from, int units, int rows, T* to, int stride) {
  using S = Simd<T>;
  for (int unit = 0; unit < stride; unit += S::lanes)
    for (int row = 0; row < rows; row += S::lanes) {
      typename S::Vector block[S::lanes];
      for (int i = 0; i < S::lanes; i++)
        block[i] = unit + i < units ? S::load(from + (size_t)(unit + i) * rows + row) : typename S::Vector{};
      transpose<T>(block);
      for (int i = 0; i < S::lanes; i++) S::store(to + (size_t)(row + i) * stride + unit, block[i]);
    }
}

}  // namespace jacobiflow
