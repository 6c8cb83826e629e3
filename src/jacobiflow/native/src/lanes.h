// What a vector is on each kind of processor, on which no other file depends; and ranges of units.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jacobiflow {

struct Range {
  int first, last;
};

// The number of floats in a vector; registers for the sums of a product of tiles; and the sizes of a block of a dense layer,
// whose sums fill the registers: `tile_rows` rows by `panel_vectors` vectors of outputs.
#if defined(__AVX512F__)
constexpr int float_lanes = 16, sum_registers = 24, panel_vectors = 4;  // of 32 registers
#elif defined(__AVX__)
constexpr int float_lanes = 8, sum_registers = 12, panel_vectors = 2;  // of 16
#elif defined(__aarch64__)
constexpr int float_lanes = 4, sum_registers = 24, panel_vectors = 4;
#else
constexpr int float_lanes = 4, sum_registers = 12, panel_vectors = 4;
#endif
constexpr int tile_rows = 6;

// Vectors of GCC and Clang.
template <typename T>
struct Lanes {
  static constexpr int lanes = float_lanes * 4 / sizeof(T);
  typedef T Vector __attribute__((vector_size(4 * float_lanes)));
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Bit = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef Integer Integers __attribute__((vector_size(4 * float_lanes)));
  typedef Bit Bits __attribute__((vector_size(4 * float_lanes)));  // may overflow
  using Mask = Integers;

  static Vector load(const T* from) {
    Vector v;
    memcpy(&v, from, sizeof v);
    return v;
  }

  static void store(T* to, Vector v) { memcpy(to, &v, sizeof v); }

  static Bits bits(Vector v) { return (Bits)v; }
  static Vector from_bits(Bits bits) { return (Vector)bits; }
  static Vector convert(Integers n) { return __builtin_convertvector(n, Vector); }

  // Hides the origin of a value from GCC, which otherwise takes more than one instruction for a maximum or minimum.
  static Vector opaque(Vector v) {
#if defined(__x86_64__) && !defined(__clang__)
    asm("" : "+v"(v));
#endif
    return v;
  }

  // Returns 1 / v; with AVX-512, by an estimate and one step of Newton's method in place of a division.
  static Vector reciprocal(Vector v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
      const Vector estimate = (Vector)_mm512_rcp14_ps((__m512)v), error = T(1) - v * estimate;
      return estimate * (error > T(-1) ? error : T(1) - Vector{}) + estimate;  // the error of 0 and infinity is NaN or infinite
    }
#endif
    return T(1) / v;
  }

  static Vector sqrt(Vector v) {
#if defined(__AVX512F__)  // GCC may take the loop in two halves, through memory
    if constexpr (sizeof(T) == 4) return (Vector)_mm512_sqrt_ps((__m512)v);
    return (Vector)_mm512_sqrt_pd((__m512d)v);
#endif
    return map(v, [](T value) { return std::sqrt(value); });
  }

  static T sum(Vector v) {
    T total = 0;
    for (int i = 0; i < lanes; i++) total += v[i];
    return total;
  }

  static bool any(Mask mask) {
    bool is_any = false;
    for (int i = 0; i < lanes; i++) is_any |= mask[i] != 0;
    return is_any;
  }

  // Applies a function of a number to all lanes.
  template <typename Function>
  static Vector map(Vector v, const Function& function) {
    Vector result;
    for (int i = 0; i < lanes; i++) result[i] = function(v[i]);
    return result;
  }
};

using Vector = Lanes<float>::Vector;
using Bits = Lanes<float>::Bits;
typedef uint16_t Halves __attribute__((vector_size(2 * float_lanes)));

// Convert between float and the bits of Float16. The first is exact, and the second too if Float16 has the number.
inline Vector from_half(Halves v) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__) && defined(__AVX__)
  return (Vector)_mm256_cvtph_ps((__m128i)v);
#elif defined(__aarch64__)
  return (Vector)vcvt_f32_f16((float16x4_t)v);
#else  // moves the exponent; subnormal numbers and infinity are special
  const Bits bits = __builtin_convertvector(v, Bits), size = (bits & 0x7fff) << 13;
  const Bits normal = size + (112u << 23), infinite = size + (224u << 23);
  const Vector subnormal = (Vector)(size + (113u << 23)) - 0x1p-14f;
  const Bits magnitude = size < (1u << 23) ? (Bits)subnormal : size < (31u << 23) ? normal : infinite;
  return (Vector)(magnitude | (bits & 0x8000) << 16);
#endif
}

inline Halves to_half(Vector v) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__) && defined(__AVX__)
  return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (Halves)vcvt_f16_f32((float32x4_t)v);
#else
  const Bits sign = (Bits)v >> 16 & 0x8000, magnitude = (Bits)v & 0x7fffffff, normal = (magnitude - (112u << 23)) >> 13;
  const Bits infinite = (magnitude - (224u << 23)) >> 13;
  const Bits subnormal = (Bits)((Vector)magnitude * 0x1p24f + 0x1p23f) & 0x7ff;  // counts the smallest Float16
  const Bits half = magnitude < (113u << 23) ? subnormal : magnitude < (255u << 23) ? normal : infinite;
  return __builtin_convertvector(sign | half, Halves);
#endif
}

}  // namespace jacobiflow
