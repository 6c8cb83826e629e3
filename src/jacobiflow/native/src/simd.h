// The width of the processor's vectors, and functions on vectors of float: powers of two, and the normal distribution function.
// A NaN stays a NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace jacobiflow {

// The number of floats in a vector; and the sizes of a block of a dense layer, whose sums fill the registers: `tile_rows` rows
// by `panel_vectors` vectors of outputs.
#if defined(__AVX512F__)
constexpr int float_lanes = 16, panel_vectors = 4;
#elif defined(__AVX__)
constexpr int float_lanes = 8, panel_vectors = 2;  // for 16 registers
#else
constexpr int float_lanes = 4, panel_vectors = 4;
#endif
constexpr int tile_rows = 6;

typedef float Vector __attribute__((vector_size(4 * float_lanes)));
typedef int32_t Integers __attribute__((vector_size(4 * float_lanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * float_lanes)));  // of a Vector; unlike Integers they may overflow

inline Vector broadcast(float value) { return value - Vector{}; }

// 2^y for y <= 0, at least 2^-126, to 2e-9 before rounding. Coefficients are minimax fits in float64.
inline Vector exp2_of_negative(Vector y) {
  y = y < -126.0f ? broadcast(-126.0f) : y;
  const Vector shift = broadcast(12582912.0f);  // 1.5 * 2^23: floats of this size have no fraction
  const Vector rounded = y + shift, f = y - (rounded - shift);
  const Bits whole = (Bits)rounded - (Bits)shift;
  Vector fraction = broadcast(1.5353361e-4f);
  for (float c : {1.3398875e-3f, 9.6184374e-3f, 5.5503325e-2f, 2.4022648e-1f, 6.9314720e-1f, 1.0f})
    fraction = fraction * f + c;
  return fraction * (Vector)((whole + 127) << 23);
}

// Phi(v), to 2e-9 before rounding. Phi(-t) = 2^(-1 - q(t)) with a polynomial q up to t = 6, where Phi(-t) is 1e-9.
inline Vector normal_cdf(Vector v) {
  Vector t = v < 0.0f ? -v : v;
  const Integers far = t > 6.0f;
  t = far ? broadcast(6.0f) : t;
  Vector q = broadcast(-4.0072768e-7f);
  for (float c : {7.9270631e-6f, -6.5241548e-5f, 2.5360741e-4f, 4.0717510e-5f, -6.9896374e-3f, 5.2468930e-2f,
                  4.5921157e-1f, 1.1511053f, 0.0f})
    q = q * t + c;
  const Vector tail = far ? broadcast(0.0f) : 0.5f * exp2_of_negative(-q);
  return v < 0.0f ? tail : 1.0f - tail;
}

}  // namespace jacobiflow
