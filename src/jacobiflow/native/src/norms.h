// Layer norm and RMS norm of one row.
#pragma once

#include "vector_math.h"

namespace jacobiflow {

template <typename T>
void layer_norm(const T* x, int size, const T* weight, const T* bias, T* out) {
  using S = Simd<T>;
  typename S::Vector part{};
  const int whole = size / S::lanes * S::lanes;
  for (int k = 0; k < whole; k += S::lanes) part += S::load(x + k);
  T mean = S::sum(part);
  for (int k = whole; k < size; k++) mean += x[k];
  mean /= size;
  part = typename S::Vector{};
  for (int k = 0; k < whole; k += S::lanes) part += (S::load(x + k) - mean) * (S::load(x + k) - mean);
  T variance = S::sum(part);
  for (int k = whole; k < size; k++) variance += (x[k] - mean) * (x[k] - mean);
  const T scale = 1 / std::sqrt(variance / size + T(1e-5));
  for (int k = 0; k < whole; k += S::lanes)
    S::store(out + k, (S::load(x + k) - mean) * scale * S::load(weight + k) + S::load(bias + k));
  for (int k = whole; k < size; k++) out[k] = (x[k] - mean) * scale * weight[k] + bias[k];
}

template <typename T>
void rms_norm(const T* x, int size, const T* weight, T* out) {
  using S = Simd<T>;
  typename S::Vector part{};
  const int whole = size / S::lanes * S::lanes;
  for (int k = 0; k < whole; k += S::lanes) part += S::load(x + k) * S::load(x + k);
  T squares = S::sum(part);
  for (int k = whole; k < size; k++) squares += x[k] * x[k];
  const T scale = 1 / std::sqrt(squares / size + T(1e-6));
  for (int k = 0; k < whole; k += S::lanes) S::store(out + k, S::load(x + k) * scale * S::load(weight + k));
  for (int k = whole; k < size; k++) out[k] = x[k] * scale * weight[k];
}

}  // namespace jacobiflow
