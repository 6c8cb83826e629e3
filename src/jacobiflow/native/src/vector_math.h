// Elementary functions on vectors of float or double, as lanes.h defines them. Measured errors are at most 2.7
// units in the last place, and 3.6 for softplus with beta other than 1. A NaN stays a NaN. Decimal coefficients are minimax
// fits in float64, with an error of at most 2^-25 of the function's value.
#pragma once

#include <initializer_list>
#include <limits>

#include "lanes.h"

namespace jacobiflow {

template <typename T>
struct Simd : Lanes<T> {
  using L = Lanes<T>;
  using L::bits, L::convert, L::from_bits, L::map, L::opaque;
  using typename L::Bit, typename L::Bits, typename L::Integer, typename L::Integers, typename L::Mask, typename L::Vector;

  static constexpr bool is_float = sizeof(T) == 4;
  static constexpr int mantissa_bits = is_float ? 23 : 52;
  static constexpr Integer exponent_bias = is_float ? 127 : 1023;
  static constexpr T smallest = is_float ? T(0x1p-126) : T(0x1p-1022);  // normal number
  static constexpr T epsilon = is_float ? T(0x1p-23) : T(0x1p-52);
  static constexpr T infinity = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();

  static Vector broadcast(T value) { return value - Vector{}; }

  static Vector abs(Vector v) { return opaque(from_bits(bits(v) & ~sign_bit)); }

  static Vector max(Vector v, T bound) {
    const Vector other = opaque(broadcast(bound));
    return v < other ? other : v;
  }

  static Vector min(Vector v, T bound) {
    const Vector other = opaque(broadcast(bound));
    return v > other ? other : v;
  }

  // e^v; infinite or 0 beyond the range of T.
  static Vector exp(Vector v) {
    const Reduced r(min(max(v, lowest_log), is_float ? 89 : 710), exponent_bias);
    // Two factors, as one would overflow or underflow first.
    const Bits half = (r.exponent << (mantissa_bits - 1)) & exponent_mask;
    const Vector first = from_bits(half), second = from_bits((r.exponent << mantissa_bits) - half);
    return (first * r.expm1 + first) * second;
  }

  // e^v for v <= 88, at least the smallest normal number.
  static Vector exp_of_small(Vector v) { return Reduced(max(v, is_float ? -87 : -708)).exp(); }

  // 2^v for v <= 0, at least the smallest normal number; for float to 2e-9 before rounding.
  static Vector exp2_of_negative(Vector v) {
    if constexpr (is_float) {
      v = v < T(-126) ? broadcast(-126) : v;
      const Vector rounded = v + broadcast(shift), f = v - (rounded - broadcast(shift));
      const Bits whole = bits(rounded) - bits(broadcast(shift));
      Vector fraction = broadcast(1.5353361e-4f);
      for (float c : {1.3398875e-3f, 9.6184374e-3f, 5.5503325e-2f, 2.4022648e-1f, 6.9314720e-1f, 1.0f})
        fraction = fraction * f + c;
      return fraction * from_bits((whole + exponent_bias) << mantissa_bits);
    }
    return exp_of_small(v * T(0.69314718055994530942));
  }

  // e^v - 1 for v <= 88, with all digits if v is small.
  static Vector expm1(Vector v) {
    const Reduced r(max(v, is_float ? -20 : -40));
    return r.power() * r.expm1 + (r.power() - T(1));
  }

  // ln v; -infinity at 0, and NaN below.
  static Vector log(Vector v) {
    const Mask tiny = v < smallest;
    const Vector x = tiny ? v * grown : v;
    // x = (1 + f) 2^k with 1 + f between the square roots of 1/2 and of 2.
    const Bits above = bits(x) - bits(broadcast(T(0.70710678118654752440)));
    const Vector f = from_bits(bits(x) - (above & exponent_mask)) - T(1);
    const Vector k = to_floating((Integers)above >> mantissa_bits) - (tiny ? broadcast(grown_bits) : Vector{});
    Vector fraction;  // ln(1 + f)
    if constexpr (is_float) {
      const Vector square = f * f;
      fraction = square * polynomial({-0.499999911f, 0.333339453f, -0.250017762f, 0.199622393f, -0.165703148f, 0.149163589f,
                                      -0.143077075f, 0.0873875618f}, f, square) + f;
    } else {
      const Vector s = f / (f + T(2)), z = s * s;  // ln(1 + f) = 2 artanh(s)
      Vector series = broadcast(T(1) / 23);
      for (int n = 21; n >= 3; n -= 2) series = series * z + T(1) / n;
      fraction = s * z * series * T(2) + s * T(2);
    }
    const Vector result = v < infinity ? k * ln2_high + (k * ln2_low + fraction) : v;
    return v > T(0) ? result : (v == T(0) ? broadcast(-infinity) : broadcast(nan));
  }

  static Vector tanh(Vector v) {
    const Vector size = min(abs(v), 22);
    Vector numerator, denominator;
    if constexpr (is_float) {
      // e^(-2 |v|) = power (1 - t) / (1 + t) with t = tanh(h) and |h| <= ln(2) / 4.
      const Vector shifted = size * T(-2.88539008177792681472) + start, power = from_bits(bits(shifted) << mantissa_bits);
      const Vector h = (shifted - start) * T(0.34657359027997265471) + size, z = h * h;
      const Vector t = (((z * -0.0527152829f + 0.133311421f) * z - 0.333333224f) * z + T(1)) * h;
      const Vector difference = T(1) - power, sum = power + T(1);
      numerator = sum * t + difference;
      denominator = difference * t + sum;
    } else {
      const Reduced r(size * T(-2));
      numerator = (T(1) - r.power()) - r.power() * r.expm1;
      denominator = T(2) - numerator;
    }
    return from_bits(bits(numerator / denominator) | (bits(v) & sign_bit));
  }

  // 1 / (1 + e^-v) as c / (c + c e^-v), in which c e^-v does not overflow.
  static Vector sigmoid(Vector v) {
    const T c = T(1) / grown;
    return c / (Reduced(-min(max(v, lowest_log), 70), -grown_bits).exp() + c);
  }

  // ln(1 + e^(beta v)) / beta, or v above the threshold, as in PyTorch.
  static Vector softplus(Vector v, T beta, T threshold) {
    const Vector scaled = v * beta;
    const Vector small = Reduced(-min(abs(scaled), -lowest_log), grown_bits).exp() * (T(1) / grown);  // e^-|beta v|
    return scaled > threshold ? v : (max(scaled, 0) + log1p(small)) / beta;
  }

  // The distribution function of a standard normal variable, Phi(v). For float Phi(-t) = 2^(-1 - q(t)), to 2e-9 before
  // rounding, with a polynomial q up to t = 6, where Phi(-t) is 1e-9.
  static Vector normal_cdf(Vector v) {
    if constexpr (is_float) {
      Vector t = v < T(0) ? -v : v;
      const Mask far = t > T(6);
      t = far ? broadcast(6) : t;
      Vector q = broadcast(-4.0072768e-7f);
      for (float c : {7.9270631e-6f, -6.5241548e-5f, 2.5360741e-4f, 4.0717510e-5f, -6.9896374e-3f, 5.2468930e-2f,
                      4.5921157e-1f, 1.1511053f, 0.0f})
        q = q * t + c;
      const Vector tail = far ? Vector{} : T(0.5) * exp2_of_negative(-q);
      return v < T(0) ? tail : T(1) - tail;
    }
    return map(v, [](T value) { return T(0.5) * erfc(value * T(-0.70710678118654752440)); });
  }

  // v Phi(v).
  static Vector gelu(Vector v) { return v * normal_cdf(v); }

  // v / (1 + e^-v).
  static Vector silu(Vector v) { return v * sigmoid(v); }

  // v modulo the period, in [0, period).
  static Vector remainder(Vector v, T period) {
    const Vector rest = map(v, [&](T value) { return fmod(value, period); });
    return rest < T(0) ? rest + period : rest;
  }

 private:
  static constexpr Bit sign_bit = Bit(1) << (8 * sizeof(T) - 1), exponent_mask = ~Bit(0) << mantissa_bits;
  static constexpr T shift = is_float ? T(12582912) : T(6755399441055744);  // 1.5 * 2^23, 2^52: numbers without a fraction
  static constexpr T start = shift + exponent_bias;  // the last bits of start + n are the exponent of 2^n
  static constexpr T ln2_high = is_float ? T(0.693359375) : T(0.693147180369123816490);
  static constexpr T ln2_low = is_float ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);
  static constexpr T lowest_log = is_float ? -104 : -746;  // e^v is 0 below
  static constexpr int grown_bits = is_float ? 24 : 54;
  static constexpr T grown = is_float ? T(16777216) : T(18014398509481984);  // 2^24, 2^54: makes subnormal numbers normal

  // Reduces v to n ln 2 + r with |r| <= ln(2) / 2. Holds e^r - 1, and the exponent of 2^(n + more) in the last bits.
  struct Reduced {
    Bits exponent;
    Vector expm1;

    explicit Reduced(Vector v, int more = 0) {
      const Vector shifted = v * T(1.44269504088896340736) + (start + more), n = shifted - (start + more);
      const Vector r = (v - n * ln2_high) - n * ln2_low, square = r * r;
      exponent = bits(shifted);
      if constexpr (is_float) {
        expm1 = square * polynomial({0.49999997f, 0.166665465f, 0.041667439f, 0.00836625602f, 0.00138703198f}, r, square) + r;
      } else {
        T factor = 1, series[13];
        for (int k = 0; k < 13; k++) series[k] = factor /= k + 2;
        expm1 = square * polynomial(series, r, square) + r;
      }
    }

    Vector power() const { return from_bits(exponent << mantissa_bits); }

    Vector exp() const { return power() * expm1 + power(); }
  };

  // ln(1 + v) for v from 0 to 1, with all digits if v is small.
  static Vector log1p(Vector v) {
    if constexpr (is_float) {
      const Vector square = v * v;
      return square * polynomial({-0.499999315f, 0.333304644f, -0.249580204f, 0.196921214f, -0.153449774f, 0.106613711f,
                                  -0.0574604832f, 0.0200884603f, -0.00329107419f}, v, square) + v;
    }
    const Vector sum = v + T(1);
    return log(sum) + (v - (sum - T(1))) / sum;
  }

  // Returns the sum of coefficients[k] x^k, in pairs that do not wait for each other.
  template <int size>
  static Vector polynomial(const T (&coefficients)[size], Vector x, Vector square) {
    Vector total = broadcast(coefficients[size - 1]);
    if constexpr (size % 2 == 0) total = x * total + coefficients[size - 2];
    for (int k = size - 4 + size % 2; k >= 0; k -= 2) total = total * square + (x * coefficients[k + 1] + coefficients[k]);
    return total;
  }

  static Vector to_floating(Integers n) {
    if constexpr (is_float) return convert(n);
    return from_bits((Bits)n + bits(broadcast(shift))) - shift;
  }
};

}  // namespace jacobiflow
