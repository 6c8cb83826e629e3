// Elementary functions on vectors of float or double, as wide as the processor's (vector types of GCC and Clang).
// Errors are one or two units in the last place. A NaN stays a NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace jacobiflow {

template <typename T>
struct Lanes {
  static constexpr bool is_float = std::is_same<T, float>::value;
  static constexpr int count = lanes * 4 / sizeof(T);
  using Integer = typename std::conditional<is_float, int32_t, int64_t>::type;
  typedef T Vector __attribute__((vector_size(4 * lanes)));
  typedef Integer Integers __attribute__((vector_size(4 * lanes)));
  typedef typename std::make_unsigned<Integer>::type Bits __attribute__((vector_size(4 * lanes)));  // may overflow

  static constexpr int mantissa_bits = is_float ? 23 : 52;
  static constexpr Integer exponent_bias = is_float ? 127 : 1023;
  static constexpr T smallest = std::numeric_limits<T>::min();  // normal number
  static constexpr T infinity = std::numeric_limits<T>::infinity();
  static constexpr T nan = std::numeric_limits<T>::quiet_NaN();

  static Vector load(const T* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }

  static void store(T* to, Vector v) { std::memcpy(to, &v, sizeof v); }

  static Vector spread(T value) { return value - Vector{}; }

  static Vector absolute(Vector v) { return v < T(0) ? -v : v; }

  static Vector max(Vector v, T bound) { return v < bound ? spread(bound) : v; }

  static Vector min(Vector v, T bound) { return v > bound ? spread(bound) : v; }

  static Vector sqrt(Vector v) {
    Vector root;
    for (int i = 0; i < count; i++) root[i] = std::sqrt(v[i]);
    return root;
  }

  // e^v; infinite or 0 beyond the range of T.
  static Vector exp(Vector v) {
    const Reduced r(min(max(v, is_float ? -104 : -746), is_float ? 89 : 710));
    const Integers half = r.whole >> 1;  // two factors, as one would overflow or underflow first
    return (r.expm1 + T(1)) * power_of_two(half) * power_of_two(r.whole - half);
  }

  // e^v for v <= 88, at least the smallest normal number.
  static Vector exp_of_small(Vector v) {
    const Reduced r(max(v, is_float ? -87 : -708));
    return (r.expm1 + T(1)) * power_of_two(r.whole);
  }

  // e^v - 1 for v <= 88, with all digits if v is small.
  static Vector expm1(Vector v) {
    const Reduced r(max(v, is_float ? -20 : -40));
    const Vector scale = power_of_two(r.whole);
    return scale * r.expm1 + (scale - T(1));
  }

  // ln v; -infinity at 0, and NaN below.
  static Vector log(Vector v) {
    const Integers tiny = v < smallest;
    const T grown = is_float ? T(16777216) : T(18014398509481984);  // 2^24, 2^54
    const Vector x = tiny ? v * grown : v;
    const Bits bits = (Bits)x;
    // x = m 2^k with m between the square roots of 1/2 and of 2.
    const Integers k = (Integers)(bits - (Bits)spread(T(0.70710678118654752440))) >> mantissa_bits;
    const Vector f = (Vector)(bits - ((Bits)k << mantissa_bits)) - T(1), s = f / (f + T(2)), z = s * s;
    Vector series = spread(T(1) / (is_float ? 11 : 23));  // ln m = 2 artanh(s)
    for (int n = is_float ? 9 : 21; n >= 3; n -= 2) series = series * z + T(1) / n;
    const Vector power = to_floating(k) - (tiny ? spread(is_float ? 24 : 54) : Vector{});
    const Vector sum = power * ln2_low + (s * z * series) * T(2);
    const Vector result = power * ln2_high + (s * T(2) + sum);
    const Vector out_of_range = v == T(0) ? spread(-infinity) : (v < T(0) ? spread(nan) : v);
    return ((v > T(0)) & (v < infinity)) ? result : out_of_range;
  }

  // ln(1 + v) for v >= 0, with all digits if v is small.
  static Vector log1p(Vector v) {
    const Vector sum = v + T(1);
    return log(sum) + (v - (sum - T(1))) / sum;
  }

  static Vector tanh(Vector v) {
    const Vector size = absolute(v), e = expm1(min(size, 30) * T(-2)), t = -e / (e + T(2));
    return v < T(0) ? -t : (v == v ? t : v);
  }

  static Vector sigmoid(Vector v) { return T(1) / (exp(-v) + T(1)); }

  // ln(1 + e^(beta v)) / beta, or v above the threshold, as in PyTorch.
  static Vector softplus(Vector v, T beta, T threshold) {
    const Vector scaled = v * beta;
    return scaled > threshold ? v : log1p(exp(min(scaled, threshold))) / beta;
  }

  // The distribution function of a standard normal variable, Phi(v).
  static Vector normal_cdf(Vector v) {
    if constexpr (is_float) return jacobiflow::normal_cdf(v);
    Vector out;
    for (int i = 0; i < count; i++) out[i] = T(0.5) * std::erfc(v[i] * T(-0.70710678118654752440));
    return out;
  }

  // v Phi(v).
  static Vector gelu(Vector v) { return v * normal_cdf(v); }

  // v modulo the period, from 0 up to below it.
  static Vector remainder(Vector v, T period) {
    Vector rest;
    for (int i = 0; i < count; i++) rest[i] = std::fmod(v[i], period);
    return rest < T(0) ? rest + period : rest;
  }

 private:
  static constexpr T shift = is_float ? T(12582912) : T(6755399441055744);  // 1.5 * 2^23, 2^52: numbers without a fraction
  static constexpr T ln2_high = is_float ? T(0.693359375) : T(0.693147180369123816490);
  static constexpr T ln2_low = is_float ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);

  // v = whole ln 2 + r with |r| <= ln(2) / 2, and e^r - 1 by its series.
  struct Reduced {
    Integers whole;
    Vector expm1;

    explicit Reduced(Vector v) {
      const Vector shifted = v * T(1.44269504088896340736) + shift, n = shifted - shift;
      whole = (Integers)((Bits)shifted - (Bits)spread(shift));
      const Vector r = (v - n * ln2_high) - n * ln2_low;
      constexpr int terms = is_float ? 7 : 14;
      T factor = 1;
      T factors[terms + 1];
      for (int k = 1; k <= terms; k++) factors[k] = factor /= k;
      Vector series = spread(factors[terms]);
      for (int k = terms - 1; k >= 2; k--) series = series * r + factors[k];
      expm1 = series * r * r + r;
    }
  };

  static Vector power_of_two(Integers n) { return (Vector)(((Bits)n + exponent_bias) << mantissa_bits); }

  static Vector to_floating(Integers n) { return (Vector)((Bits)n + (Bits)spread(shift)) - shift; }
};

}  // namespace jacobiflow
