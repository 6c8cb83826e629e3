// Affine transforms of one feature, on vectors of rows, and their gradients.
#pragma once

#include "boundary.h"
#include "lanes.h"

namespace jacobiflow {

// Parameters of a feature on a vector of rows: those that follow each other are `stride` numbers apart.
template <typename T>
struct Parameters {
  const T* first;
  int stride;
  typename Lanes<T>::Vector operator[](int i) const { return Lanes<T>::load(first + (size_t)i * stride); }
};

// Gradients of a loss in a transform's value and in the logarithm of its derivative; x -> y, or y -> x if inverted.
template <typename Vector>
struct Gradients {
  Vector value, log_slope;
};

// With the slope dy/dx and d(log slope)/dx, the gradient that a loss of x and of -log(slope) has in y.
template <typename Vector>
Vector inverse_gradient(const Gradients<Vector>& g, Vector slope, Vector bend) {
  return (g.value - g.log_slope * bend) / slope;
}

template <typename T>
struct Affine {
  using L = Lanes<T>;
  using Vector = typename L::Vector;

  // y = scale x + shift, or the inverse; sets the logarithm of the scale.
  static Vector apply(const Transform& t, const Parameters<T>& p, bool inverts, Vector in, Vector& log_scale) {
    const Vector first = p[0], second = p[1];
    const T a = (T)t.first, b = (T)t.second;
    Vector shift = first, factor;
    switch (t.kind) {
      case TransformKind::soft_clipped_affine: log_scale = second * L::reciprocal(L::absolute(second) * a + T(1)); break;
      case TransformKind::clamped_affine: log_scale = L::min(L::max(second, a), b); break;
      case TransformKind::log_affine:  // x = exp(s) y + u
        log_scale = -first;
        return inverts ? in * L::exp(first) + second : (in - second) * L::exp(-first);
      default:
        shift = second;
        factor = (t.kind == TransformKind::softplus_affine ? L::softplus(first, 1, 20) : L::sigmoid(first + a)) + b;
        log_scale = L::log(factor);
        return inverts ? (in - shift) / factor : in * factor + shift;
    }
    return inverts ? (in - shift) * L::exp(-log_scale) : in * L::exp(log_scale) + shift;
  }

  // From the gradients of the result, writes those of the parameters and returns that of the input.
  static Vector differentiate(const Transform& t, const Parameters<T>& p, bool inverts, Vector x, Gradients<Vector> g,
                              T* to) {
    const Vector first = p[0], second = p[1];
    const T a = (T)t.first, b = (T)t.second;
    Vector scale, to_scale = L::spread(1);  // the second: the derivative of the logarithm of the scale, or of the scale
    switch (t.kind) {
      case TransformKind::soft_clipped_affine: {
        const Vector clip = L::reciprocal(L::absolute(second) * a + T(1));
        scale = L::exp(second * clip), to_scale = clip * clip;
        break;
      }
      case TransformKind::clamped_affine: scale = L::exp(L::min(L::max(second, a), b)); break;  // clamped without a kink
      case TransformKind::log_affine: scale = L::exp(-first); break;
      case TransformKind::softplus_affine:
        scale = L::softplus(first, 1, 20) + b, to_scale = first > T(20) ? to_scale : L::sigmoid(first);
        break;
      default: {
        const Vector s = L::sigmoid(first + a);
        scale = s + b, to_scale = s * (T(1) - s);
      }
    }
    const Vector result = inverts ? inverse_gradient(g, scale, Vector{}) : g.value * scale;
    if (inverts) g = {-result, -g.log_slope};
    switch (t.kind) {
      case TransformKind::soft_clipped_affine:
      case TransformKind::clamped_affine:
        L::store(to, g.value);
        L::store(to + p.stride, (g.value * x * scale + g.log_slope) * to_scale);
        break;
      case TransformKind::log_affine:  // y = (x - second) scale
        L::store(to, -(g.value * (x - second) * scale + g.log_slope));
        L::store(to + p.stride, -g.value * scale);
        break;
      default:
        L::store(to, (g.value * x + g.log_slope * L::reciprocal(scale)) * to_scale);
        L::store(to + p.stride, g.value);
    }
    return result;
  }
};

}  // namespace jacobiflow
