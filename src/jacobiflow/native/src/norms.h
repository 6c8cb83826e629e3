// Layer norm and RMS norm of one row.
#pragma once

#include "vector_math.h"

namespace jacobiflow {

// Returns the sum of term(x) over a row, where `term` takes a vector or a number.
template <typename T, typename Term>
T sum_of(const T* x, int size, const Term& term) {
  using S = Simd<T>;
  typename S::Vector sums{};
  int k = 0;
  for (; k + S::lanes <= size; k += S::lanes) sums += term(S::load(x + k));
  T total = S::sum(sums);
  for (; k < size; k++) total += term(x[k]);
  return total;
}

// Writes (x - mean) * scale * weight + bias. `out` may be x, and a null bias is 0.
template <typename T>
void scale_row(const T* x, int size, T mean, T scale, const T* weight, const T* bias, T* out) {
  using S = Simd<T>;
  int k = 0;
  for (; k + S::lanes <= size; k += S::lanes) {
    const typename S::Vector scaled = (S::load(x + k) - mean) * scale * S::load(weight + k);
    S::store(out + k, bias ? scaled + S::load(bias + k) : scaled);
  }
  for (; k < size; k++) out[k] = (x[k] - mean) * scale * weight[k] + (bias ? bias[k] : T(0));
}

template <typename T>
void layer_norm(const T* x, int size, const T* weight, const T* bias, T* out) {
  const T mean = sum_of(x, size, [](auto v) { return v; }) / size;
  const T variance = sum_of(x, size, [mean](auto v) { return (v - mean) * (v - mean); }) / size;
  scale_row(x, size, mean, 1 / std::sqrt(variance + T(1e-5)), weight, bias, out);
}

template <typename T>
void rms_norm(const T* x, int size, const T* weight, T* out) {
  const T square = sum_of(x, size, [](auto v) { return v * v; }) / size;
  scale_row<T>(x, size, 0, 1 / std::sqrt(square + T(1e-6)), weight, nullptr, out);
}

}  // namespace jacobiflow
