// Vectors as wide as the processor's (vector types of GCC and Clang) and loops over them in float32: dense layers on
// packed weights, layer normalisation, powers of two, GELU and SiLU. A NaN stays a NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "team.h"

namespace jacobiflow {

#if defined(__AVX512F__)
constexpr int lanes = 16, panel_vectors = 4;
#elif defined(__AVX__)
constexpr int lanes = 8, panel_vectors = 2;  // its 16 registers hold 6 x 2 sums
#else
constexpr int lanes = 4, panel_vectors = 4;
#endif
constexpr int panel = lanes * panel_vectors;  // columns of a weight that lie side by side
constexpr int tile_rows = 6;

typedef float Vector __attribute__((vector_size(4 * lanes)));
typedef int32_t Integers __attribute__((vector_size(4 * lanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * lanes)));  // of a Vector; unlike Integers they may overflow

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

inline Vector spread(float value) { return value - Vector{}; }

inline float sum(Vector v) {
  float total = 0;
  for (int i = 0; i < lanes; i++) total += v[i];
  return total;
}

inline int rounded_up(int n) { return (n + lanes - 1) / lanes * lanes; }

// 2^y for y <= 0, at least 2^-126, to 2e-9 before rounding. Coefficients are minimax fits in float64.
inline Vector exp2_of_negative(Vector y) {
  y = y < -126.0f ? spread(-126.0f) : y;
  const Vector shift = spread(12582912.0f);  // 1.5 * 2^23: floats of this size have no fraction
  const Vector rounded = y + shift, f = y - (rounded - shift);
  const Bits whole = (Bits)rounded - (Bits)shift;
  Vector fraction = spread(1.5353361e-4f);
  for (float c : {1.3398875e-3f, 9.6184374e-3f, 5.5503325e-2f, 2.4022648e-1f, 6.9314720e-1f, 1.0f})
    fraction = fraction * f + c;
  return fraction * (Vector)((whole + 127) << 23);
}

// Phi(v), to 2e-9 before rounding. Phi(-t) = 2^(-1 - q(t)) with a polynomial q up to t = 6, where Phi(-t) is 1e-9.
inline Vector normal_cdf(Vector v) {
  Vector t = v < 0.0f ? -v : v;
  const Integers far = t > 6.0f;
  t = far ? spread(6.0f) : t;
  Vector q = spread(-4.0072768e-7f);
  for (float c : {7.9270631e-6f, -6.5241548e-5f, 2.5360741e-4f, 4.0717510e-5f, -6.9896374e-3f, 5.2468930e-2f,
                  4.5921157e-1f, 1.1511053f, 0.0f})
    q = q * t + c;
  const Vector tail = far ? spread(0.0f) : 0.5f * exp2_of_negative(-q);
  return v < 0.0f ? tail : 1.0f - tail;
}

// v Phi(v).
inline Vector gelu(Vector v) { return v * normal_cdf(v); }

// v / (1 + e^-v).
inline Vector silu(Vector v) {
  const Vector tail = exp2_of_negative((v < 0.0f ? v : -v) * 1.44269504f);  // e^-|v|
  return v * (v < 0.0f ? tail : spread(1.0f)) / (1.0f + tail);
}

// Copies columns [first, first + panel) of weight (outputs, inputs) to a panel (inputs, panel); the last one is narrower.
inline void pack(const float* weight, int outputs, int inputs, int first, float* packed) {
  constexpr int chunk = 64;  // inputs at a time, so that cache lines are written whole
  const int width = outputs - first < panel ? rounded_up(outputs - first) : panel;
  packed += (int64_t)first * inputs;
  for (int start = 0; start < inputs; start += chunk)
    for (int j = 0; j < width; j++) {
      const float* row = weight + (int64_t)(first + j) * inputs;
      for (int k = start; k < inputs && k < start + chunk; k++)
        packed[(int64_t)k * width + j] = first + j < outputs ? row[k] : 0.0f;
    }
}

// Sums of `rows` rows and `vectors` vectors of columns, in registers. With few rows, even and odd inputs have separate
// sums, so that additions do not wait for each other.
template <int rows, int vectors>
inline void tile(const float* x, int stride, const float* weight, int width, int inputs, Vector (&out)[rows][vectors]) {
  constexpr int ways = rows <= 2 ? 2 : 1;
  Vector sums[ways][rows][vectors] = {};
  int k = 0;
  for (; k + ways <= inputs; k += ways)
    for (int way = 0; way < ways; way++) {
      const float* w = weight + (int64_t)(k + way) * width;
      Vector columns[vectors];
      for (int v = 0; v < vectors; v++) columns[v] = load(w + v * lanes);
      for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sums[way][r][v] += x[(int64_t)r * stride + k + way] * columns[v];
    }
  for (; k < inputs; k++)
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < vectors; v++)
        sums[0][r][v] += x[(int64_t)r * stride + k] * load(weight + (int64_t)k * width + v * lanes);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) out[r][v] = ways == 1 ? sums[0][r][v] : sums[0][r][v] + sums[ways - 1][r][v];
}

template <int rows, int vectors, typename Use>
inline void dense_tile(const float* x, int stride, const float* weight, int width, int inputs, int row, int column,
                       const Use& use) {
  Vector out[rows][vectors];
  tile<rows, vectors>(x + (int64_t)row * stride, stride, weight, width, inputs, out);
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < vectors; v++) use(row + r, column + v * lanes, out[r][v]);
}

template <int vectors, typename Use>
inline void dense_rows(const float* x, int stride, const float* weight, int width, int inputs, int rows, int column,
                       const Use& use) {
  const int tiles = (rows + tile_rows - 1) / tile_rows;
  for (int i = 0; i < tiles; i++) {
    const int row = (int)((int64_t)rows * i / tiles);
    switch ((int)((int64_t)rows * (i + 1) / tiles) - row) {
      case 1: dense_tile<1, vectors>(x, stride, weight, width, inputs, row, column, use); break;
      case 2: dense_tile<2, vectors>(x, stride, weight, width, inputs, row, column, use); break;
      case 3: dense_tile<3, vectors>(x, stride, weight, width, inputs, row, column, use); break;
      case 4: dense_tile<4, vectors>(x, stride, weight, width, inputs, row, column, use); break;
      case 5: dense_tile<5, vectors>(x, stride, weight, width, inputs, row, column, use); break;
      default: dense_tile<6, vectors>(x, stride, weight, width, inputs, row, column, use);
    }
  }
}

// Multiplies x (rows, inputs) by some columns of a packed weight, from a multiple of `lanes` on; calls use(row, column,
// vector of sums).
template <typename Use>
inline void dense(const float* x, int stride, const float* packed, int inputs, int outputs, int rows, Range columns,
                  const Use& use) {
  for (int column = columns.first; column < columns.last;) {
    const int start = column / panel * panel;
    const int width = outputs - start < panel ? rounded_up(outputs - start) : panel;
    const int last = start + width < columns.last ? start + width : columns.last;
    const float* weight = packed + (int64_t)start * inputs + (column - start);
    const int vectors = (last - column + lanes - 1) / lanes;
    switch (vectors) {
      case 1: dense_rows<1>(x, stride, weight, width, inputs, rows, column, use); break;
      case 2: dense_rows<2>(x, stride, weight, width, inputs, rows, column, use); break;
#if !defined(__AVX__) || defined(__AVX512F__)
      case 3: dense_rows<3>(x, stride, weight, width, inputs, rows, column, use); break;
      default: dense_rows<4>(x, stride, weight, width, inputs, rows, column, use);
#endif
    }
    column += vectors * lanes;
  }
}

inline void layer_norm(const float* x, int size, const float* weight, const float* bias, float* out) {
  const int whole = size / lanes * lanes;
  Vector part{};
  for (int k = 0; k < whole; k += lanes) part += load(x + k);
  float mean = sum(part);
  for (int k = whole; k < size; k++) mean += x[k];
  mean /= size;
  part = Vector{};
  for (int k = 0; k < whole; k += lanes) part += (load(x + k) - mean) * (load(x + k) - mean);
  float variance = sum(part);
  for (int k = whole; k < size; k++) variance += (x[k] - mean) * (x[k] - mean);
  const float scale = 1.0f / std::sqrt(variance / size + 1e-5f);
  for (int k = 0; k < whole; k += lanes)
    store(out + k, (load(x + k) - mean) * scale * load(weight + k) + load(bias + k));
  for (int k = whole; k < size; k++) out[k] = (x[k] - mean) * scale * weight[k] + bias[k];
}

inline void rms_norm(const float* x, int size, const float* weight, float* out) {
  const int whole = size / lanes * lanes;
  Vector part{};
  for (int k = 0; k < whole; k += lanes) part += load(x + k) * load(x + k);
  float squares = sum(part);
  for (int k = whole; k < size; k++) squares += x[k] * x[k];
  const float scale = 1.0f / std::sqrt(squares / size + 1e-6f);
  for (int k = 0; k < whole; k += lanes) store(out + k, load(x + k) * scale * load(weight + k));
  for (int k = whole; k < size; k++) out[k] = x[k] * scale * weight[k];
}

}  // namespace jacobiflow
