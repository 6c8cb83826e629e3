// Monotone polynomials of one feature, on vectors of rows, and their gradients: Bernstein polynomials and integrals of sums of
// squares, as zuko defines them.
#pragma once

#include "affine.h"

namespace jacobiflow {

// Solves f(x) = y for an increasing f in [-bound, bound] by Newton's method from `x`. A bisection replaces a step that is not
// clearly shorter than the step two before it. If f does not reach y, the solution is the nearer bound. Ends once a step is a
// rounding error of x, or f - y is one, at most `rounding`.
template <typename T, typename Polynomial, typename Vector>
Vector solve(const Polynomial& f, Vector y, Vector rounding, T bound, Vector x) {
  using S = Simd<T>;
  const T tolerance = 2 * Simd<T>::epsilon;
  Vector below = S::broadcast(-bound), above = S::broadcast(bound), step = S::broadcast(4 * bound), earlier = step;
  typename S::Mask is_moving = below < above;
  x = S::min(S::max(x, -bound), bound);
  do {
    Vector value, slope;
    f.evaluate(x, value, slope);
    const Vector error = value - y;
    below = error < T(0) ? x : below, above = error < T(0) ? above : x;
    Vector next = x - error / slope;
    next = next > below ? next : below;
    next = next < above ? next : above;
    const typename S::Mask is_exact = S::abs(error) <= rounding;
    next = is_exact | (S::abs(next - x) < S::abs(earlier) * T(0.6)) ? next : (below + above) * T(0.5);
    earlier = step, step = next - x;
    x = is_moving ? next : x;
    is_moving &= ~is_exact & (S::abs(step) > tolerance * S::max(S::abs(x), 1));
  } while (S::any(is_moving));
  return x;
}

// A Bernstein polynomial from [-high, high] to itself, whose `bins` coefficients differ by entries of a softmax, except for the
// first and last three. Within `edge_margin` of an end and beyond it, zuko continues it with slope 1 from the end, so that it
// jumps by the margin. `memory` has room for two vectors per coefficient.
template <typename T>
class Bernstein {
 public:
  using S = Simd<T>;
  using Vector = typename S::Vector;
  using Mask = typename S::Mask;

  Bernstein(const Transform& t, const Parameters<T>& p, bool inverts, T* memory)
      : p(p), inverts(inverts), degree(t.bins - 1), bound((T)t.high), margin((T)t.edge_margin),
        edge(2 * bound / degree), values(memory), changes(memory + (size_t)t.bins * S::lanes) {
    write_changes();
  }

  // Transforms x, or y if the polynomial is inverted. Sets the logarithm of dy/dx if it is wanted, and makes `non_finite` NaN
  // where a parameter is not finite.
  Vector apply(Vector in, bool wants_log_slope, Vector& log_slope, Vector& non_finite) {
    scale_coefficients();
    const T end = inverts ? bound : bound - margin;
    const Mask is_in = (in > -end) & (in < end);
    const Vector inside = is_in ? in : Vector{};
    const Vector rounding = S::broadcast(2 * degree * bound * Simd<T>::epsilon);
    const Vector x = inverts ? solve<T>(*this, inside, rounding, bound - margin, inside) : inside;
    Vector value, slope;
    evaluate(x, value, slope);
    non_finite += value * T(0);
    if (wants_log_slope) log_slope = is_in ? S::log(slope) : Vector{};
    const T shift = inverts ? -margin : margin;
    return is_in ? (inverts ? x : value) : in + (in > T(0) ? S::broadcast(shift) : S::broadcast(-shift));
  }

  // Sets the polynomial and its slope at x. Powers of u / (1 - u), or of its inverse, are at most 1.
  void evaluate(Vector x, Vector& value, Vector& slope) const {
    const Vector u = (x + bound) / (2 * bound), rest = T(1) - u;
    const Mask is_low = u < rest;
    const Vector larger = is_low ? rest : u, ratio = (is_low ? u : rest) / larger;
    const auto at = [&](const T* from, int i, int last) {
      return is_low ? S::load(from + (size_t)i * S::lanes) : S::load(from + (size_t)(last - i) * S::lanes);
    };
    value = at(values, degree, degree), slope = Vector{};
    for (int i = degree - 1; i >= 0; i--) {
      value = value * ratio + at(values, i, degree);
      slope = slope * ratio + at(changes, i, degree - 1);
    }
    Vector power = S::broadcast(1), square = larger;
    for (int k = degree - 1; k; k >>= 1, square *= square)
      if (k & 1) power *= square;
    value *= power * larger, slope *= power;
  }

  // Writes the gradients of the parameters to `to`, and returns the gradient of the input. `g` has those of the result at x.
  Vector differentiate(Vector x, Gradients<Vector> g, T* to) {
    const Vector outside = g.value;
    const T end = bound - margin;
    const Mask is_in = (x > -end) & (x < end);
    g = {is_in ? g.value : Vector{}, is_in ? g.log_slope : Vector{}};
    const Vector u = is_in ? (x + bound) / (2 * bound) : Vector{}, rest = T(1) - u;
    T* const basis = values;  // functions of a lower degree: b_j = binomial(degree - 1, j) u^j rest^(degree - 1 - j)
    Vector power = S::broadcast(1);
    double binomial = 1;
    for (int j = 0; j < degree; j++) {
      S::store(basis + (size_t)j * S::lanes, power * (T)binomial);
      power *= u;
      binomial *= double(degree - 1 - j) / (j + 1);
    }
    Vector tail{}, slope{}, curve{}, next_power{}, next_change{};
    power = S::broadcast(1);
    for (int j = degree - 1; j >= 0; j--) {
      const Vector part = S::load(basis + (size_t)j * S::lanes), change = S::load(changes + (size_t)j * S::lanes);
      tail += part * u * power * (T(degree) / (j + 1));  // the derivative of the value in this change
      curve += part * next_power * (next_change - change) * (T)(degree - 1 - j);
      slope += part * power * change;
      S::store(basis + (size_t)j * S::lanes, part * power);
      if (j >= 2 && j < degree - 2) S::store(to + (size_t)(j - 2) * p.stride, tail);
      next_power = power, next_change = change;
      power *= rest;
    }
    const Vector bend = curve / (slope * (2 * bound)), of_slope = slope / edge;
    const Vector result = inverts ? inverse_gradient(g, of_slope, bend) : g.value * of_slope + g.log_slope * bend;
    if (inverts) g = {-result, -g.log_slope};
    g.log_slope /= slope;
    Vector mean{};
    for (int k = 0; k < degree - 4; k++) {
      T* at = to + (size_t)k * p.stride;
      const Vector of_change = g.value * S::load(at) + g.log_slope * S::load(basis + (size_t)(k + 2) * S::lanes);
      S::store(at, of_change);
      mean += of_change * S::load(changes + (size_t)(k + 2) * S::lanes);
    }
    mean /= 2 * bound - 4 * edge;
    for (int k = 0; k < degree - 4; k++) {
      T* at = to + (size_t)k * p.stride;
      S::store(at, (S::load(at) - mean) * S::load(changes + (size_t)(k + 2) * S::lanes));
    }
    return is_in ? result : outside;
  }

 private:
  const Parameters<T> p;
  const bool inverts;
  const int degree;
  const T bound, margin;
  const T edge;      // change between the first three coefficients, and between the last three
  T* const values;   // coefficients
  T* const changes;  // between coefficients

  // Writes the changes between coefficients.
  void write_changes() {
    const int count = degree - 4;
    Vector most = p[0], total{};
    for (int k = 1; k < count; k++) most = p[k] > most ? p[k] : most;
    T* const middle = changes + (size_t)2 * S::lanes;
    for (int k = 0; k < count; k++) {
      const Vector e = S::exp_of_small(p[k] - most);
      S::store(middle + (size_t)k * S::lanes, e);
      total += e;
    }
    const Vector factor = (2 * bound - 4 * edge) / total;
    for (int k = 0; k < count; k++)
      S::store(middle + (size_t)k * S::lanes, S::load(middle + (size_t)k * S::lanes) * factor);
    for (int j : {0, 1, degree - 2, degree - 1}) S::store(changes + (size_t)j * S::lanes, S::broadcast(edge));
  }

  // Writes the coefficients, and multiplies them and the changes by the factors of the polynomial and its slope.
  void scale_coefficients() {
    Vector coefficient = S::broadcast(-bound);
    double binomial = 1;  // of degree - 1 over i
    for (int i = 0; i < degree; i++) {
      S::store(values + (size_t)i * S::lanes, coefficient * (T)(binomial * degree / (degree - i)));
      T* at = changes + (size_t)i * S::lanes;
      const Vector change = S::load(at);
      S::store(at, change * (T)(binomial / edge));
      coefficient += change;
      binomial *= double(degree - 1 - i) / (i + 1);
    }
    S::store(values + (size_t)degree * S::lanes, S::broadcast(bound));
  }
};

// The integral from 0 to x of g(x / high), plus a shift; g is the mean of the squares of polynomials with the parameters a_k,
// (1 + a_k0 + a_k1 u + ...)^2, plus `min_slope`. `memory` has room for `bins` vectors, one for each coefficient of g.
template <typename T>
class SumOfSquares {
 public:
  using S = Simd<T>;
  using Vector = typename S::Vector;

  SumOfSquares(const Transform& t, const Parameters<T>& p, bool inverts, T* memory)
      : p(p), inverts(inverts), terms((t.bins + 1) / 2), count((t.parameters - 1) / terms), high((T)t.high),
        min_slope((T)t.min_slope), shift(p[t.parameters - 1]), memory(memory) {}

  // Transforms x, or y if the polynomial is inverted; x is in [-high, high] then. Sets the logarithm of dy/dx if it is wanted,
  // and makes `non_finite` NaN where a parameter is not finite.
  Vector apply(Vector in, bool wants_log_slope, Vector& log_slope, Vector& non_finite) {
    write_coefficients();
    const Vector rounding = S::abs(in - shift) * (16 * Simd<T>::epsilon);
    const Vector x = inverts ? solve<T>(*this, in - shift, rounding, high, Vector{}) : in;
    Vector value, slope;
    evaluate(x, value, slope);
    non_finite += (in - shift - value) * T(0);
    if (wants_log_slope) log_slope = S::log(slope);
    return inverts ? x : value + shift;
  }

  // Sets the integral and its slope at x. Squares are added, as coefficients of the slope would lose its digits near 0.
  void evaluate(Vector x, Vector& value, Vector& slope) const {
    const Vector u = x / high;
    value = slope = Vector{};
    for (int m = 2 * terms - 2; m >= 0; m--) value = value * u + S::load(memory + (size_t)m * S::lanes);
    value *= x;
    for (int k = 0; k < count; k++) {
      const Vector root = polynomial(k, u);
      slope += root * root;
    }
    slope = slope / (T)count + min_slope;
  }

  // Writes the gradients of the parameters to `to`, and returns the gradient of the input. `g` has those of the result at x.
  Vector differentiate(Vector x, Gradients<Vector> g, T* to) {
    const Vector u = x / high;
    Vector slope{}, bend{};
    for (int k = 0; k < count; k++) {
      Vector root{}, of_root{};
      for (int i = terms - 1; i >= 0; i--) {
        of_root = of_root * u + root;
        root = root * u + coefficient(k, i);
      }
      slope += root * root, bend += root * of_root;
    }
    const T factor = T(2) / count;
    slope = slope / (T)count + min_slope, bend = bend * (factor / high) / slope;
    const Vector result = inverts ? inverse_gradient(g, slope, bend) : g.value * slope + g.log_slope * bend;
    if (inverts) g = {-result, -g.log_slope};
    Vector power = x;
    for (int m = 1; m < 2 * terms; m++, power *= u) S::store(memory + (size_t)(m - 1) * S::lanes, power / (T)m);
    for (int k = 0; k < count; k++) {
      Vector of_power = g.log_slope * polynomial(k, u) / slope;
      for (int j = 0; j < terms; j++, of_power *= u) {
        Vector integral{};  // of the polynomial times u^j
        for (int i = 0; i < terms; i++) integral += coefficient(k, i) * S::load(memory + (size_t)(i + j) * S::lanes);
        S::store(to + (size_t)(k * terms + j) * p.stride, (g.value * integral + of_power) * factor);
      }
    }
    S::store(to + (size_t)count * terms * p.stride, g.value);
    return result;
  }

 private:
  const Parameters<T> p;
  const bool inverts;
  const int terms, count;  // coefficients of a polynomial, and number of polynomials
  const T high, min_slope;
  const Vector shift;
  T* const memory;  // coefficients of the integral divided by x

  Vector coefficient(int k, int i) const { return p[k * terms + i] + T(i == 0); }

  Vector polynomial(int k, Vector u) const {
    Vector total{};
    for (int i = terms - 1; i >= 0; i--) total = total * u + coefficient(k, i);
    return total;
  }

  void write_coefficients() {
    for (int m = 0; m < 2 * terms - 1; m++) {
      Vector total{};
      for (int k = 0; k < count; k++)
        for (int i = m < terms ? 0 : m - terms + 1; i <= std::min(m, terms - 1); i++)
          total += coefficient(k, i) * coefficient(k, m - i);
      total /= (T)count;
      if (m == 0) total += min_slope;
      S::store(memory + (size_t)m * S::lanes, total / (T)(m + 1));
    }
  }
};

}  // namespace jacobiflow
