// Affine transforms of one feature, on vectors of rows, and their gradients.
#pragma once

#include "boundary.h"
#include "vector_math.h"

namespace jacobiflow {

// Reads the parameters of a feature for a vector of rows. They are `stride` numbers apart.
template <typename T>
struct Parameters {
  const T* first;
  int stride;
  typename Simd<T>::Vector operator[](int i) const { return Simd<T>::load(first + (size_t)i * stride); }
};

// Gradients of a loss in a transform's result and in the logarithm of its derivative.
template <typename Vector>
struct Gradients {
  Vector value, log_slope;
};

// Returns the gradient in y of a loss of x and of -log(slope), from the slope dy/dx and the bend d(log slope)/dx.
template <typename Vector>
Vector inverse_gradient(const Gradients<Vector>& g, Vector slope, Vector bend) {
  return (g.value - g.log_slope * bend) / slope;
}

// A transform y = scale x + shift of one feature, or with `parametrizes_inverse` x = scale y + shift.
template <typename T>
class Affine {
 public:
  using S = Simd<T>;
  using Vector = typename S::Vector;

  Affine(const Transform& t, const Parameters<T>& p, bool inverts)
      : t(t), inverts(inverts), stride(p.stride), parameter(p[t.scale_index]), shift(p[1 - t.scale_index]) {}

  // Transforms x, or y if the transform is inverted, and sets the logarithm of dy/dx.
  Vector apply(Vector in, bool, Vector& log_slope, Vector&) const {
    const Vector factor = derivative(inverts, log_slope);
    return inverts != t.parametrizes_inverse ? (in - shift) * factor : in * factor + shift;
  }

  // Writes the gradients of the parameters to `to`, and returns the gradient of the input.
  Vector differentiate(Vector x, Gradients<Vector> g, T* to) const {
    Vector log_slope;
    const Vector slope = derivative(false, log_slope);
    const Vector result = inverts ? inverse_gradient(g, slope, Vector{}) : g.value * slope;
    if (inverts) g = {-result, -g.log_slope};
    const Vector of_log_slope = g.value * (t.parametrizes_inverse ? x - shift : x) * slope + g.log_slope;
    const Vector of_scale = (t.parametrizes_inverse ? -of_log_slope : of_log_slope) * log_scale_derivative(slope);
    S::store(to + t.scale_index * stride, of_scale);
    S::store(to + (1 - t.scale_index) * stride, t.parametrizes_inverse ? -g.value * slope : g.value);
    return result;
  }

 private:
  const Transform& t;
  const bool inverts;
  const int stride;
  const Vector parameter, shift;  // the scale's parameter, before its activation

  // Returns dy/dx, or dx/dy if `is_inverse`, and sets the logarithm of dy/dx.
  Vector derivative(bool is_inverse, Vector& log_slope) const {
    Vector scale{}, log_scale;
    bool is_exponential = true;
    switch (t.scale_activation) {
      case ScaleActivation::exp: log_scale = parameter; break;
      case ScaleActivation::soft_clipped_exp: log_scale = parameter * soft_clip(); break;
      case ScaleActivation::clamped_exp:  // NaN if the parameter is infinite, as in pyro
        log_scale = S::min(S::max(parameter, (T)t.min_log_scale), (T)t.max_log_scale) + parameter * T(0);
        break;
      case ScaleActivation::square_root: log_scale = S::log(parameter + (T)t.min_scale) * T(0.5); break;
      default:
        scale = t.scale_activation == ScaleActivation::softplus ? S::softplus(parameter, 1, 20) : sigmoid();
        scale += (T)t.min_scale;
        if (t.max_scale) scale = S::min(scale, (T)t.max_scale);
        log_scale = S::log(scale), is_exponential = false;
    }
    log_slope = t.parametrizes_inverse ? -log_scale : log_scale;
    if (is_exponential) return S::exp(is_inverse ? -log_slope : log_slope);
    return is_inverse != t.parametrizes_inverse ? T(1) / scale : scale;
  }

  // Returns the derivative of the scale's logarithm in its parameter, from the slope dy/dx.
  Vector log_scale_derivative(Vector slope) const {
    const Vector one = S::broadcast(1), inverse_scale = t.parametrizes_inverse ? slope : S::reciprocal(slope);
    switch (t.scale_activation) {
      case ScaleActivation::soft_clipped_exp: return soft_clip() * soft_clip();
      case ScaleActivation::square_root: return T(0.5) / (parameter + (T)t.min_scale);
      case ScaleActivation::softplus: {
        const Vector of_scale = (parameter > T(20) ? one : S::sigmoid(parameter)) * inverse_scale;
        return t.max_scale ? (inverse_scale > T(1 / t.max_scale) ? of_scale : Vector{}) : of_scale;
      }
      case ScaleActivation::sigmoid: return sigmoid() * (T(1) - sigmoid()) * inverse_scale;
      default: return one;  // Gradients pass a clamp, as in pyro.
    }
  }

  Vector soft_clip() const { return S::reciprocal(S::abs(parameter) * (T)t.clip + T(1)); }
  Vector sigmoid() const { return S::sigmoid(parameter + (T)t.logit_shift); }
};

}  // namespace jacobiflow
