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

template <typename T>
class Affine {
 public:
  using S = Simd<T>;
  using Vector = typename S::Vector;

  // Returns scale x + shift, or the inverse, and sets the logarithm of the scale.
  static Vector apply(const Transform& t, const Parameters<T>& p, bool inverts, Vector in, Vector& log_scale) {
    const Vector first = p[0], second = p[1];
    Vector shift = first, scale;
    switch (t.kind) {
      case TransformKind::soft_clipped_affine: log_scale = second * S::reciprocal(S::abs(second) * (T)t.clip + T(1)); break;
      case TransformKind::clamped_affine: log_scale = clamp(t, second); break;
      case TransformKind::log_affine:  // x = exp(s) y + u
        log_scale = -first;
        return inverts ? in * S::exp(first) + second : (in - second) * S::exp(-first);
      default:
        shift = second;
        scale = t.kind == TransformKind::softplus_affine ? S::softplus(first, 1, 20) : S::sigmoid(first + (T)t.logit_shift);
        scale += (T)t.min_scale;
        log_scale = S::log(scale);
        return inverts ? (in - shift) / scale : in * scale + shift;
    }
    return inverts ? (in - shift) * S::exp(-log_scale) : in * S::exp(log_scale) + shift;
  }

  // Writes the gradients of the parameters to `to`, and returns the gradient of the input.
  static Vector differentiate(const Transform& t, const Parameters<T>& p, bool inverts, Vector x, Gradients<Vector> g,
                              T* to) {
    const Vector first = p[0], second = p[1];
    Vector scale, to_scale = S::broadcast(1);  // to_scale: derivative of the logarithm of the scale, or of the scale
    switch (t.kind) {
      case TransformKind::soft_clipped_affine: {
        const Vector clip = S::reciprocal(S::abs(second) * (T)t.clip + T(1));
        scale = S::exp(second * clip), to_scale = clip * clip;
        break;
      }
      case TransformKind::clamped_affine: scale = S::exp(clamp(t, second)); break;  // gradients pass, as in pyro
      case TransformKind::log_affine: scale = S::exp(-first); break;
      case TransformKind::softplus_affine:
        scale = S::softplus(first, 1, 20) + (T)t.min_scale, to_scale = first > T(20) ? to_scale : S::sigmoid(first);
        break;
      default: {
        const Vector s = S::sigmoid(first + (T)t.logit_shift);
        scale = s + (T)t.min_scale, to_scale = s * (T(1) - s);
      }
    }
    const Vector result = inverts ? inverse_gradient(g, scale, Vector{}) : g.value * scale;
    if (inverts) g = {-result, -g.log_slope};
    switch (t.kind) {
      case TransformKind::soft_clipped_affine:
      case TransformKind::clamped_affine:
        S::store(to, g.value);
        S::store(to + p.stride, (g.value * x * scale + g.log_slope) * to_scale);
        break;
      case TransformKind::log_affine:  // y = (x - second) scale
        S::store(to, -(g.value * (x - second) * scale + g.log_slope));
        S::store(to + p.stride, -g.value * scale);
        break;
      default:
        S::store(to, (g.value * x + g.log_slope * S::reciprocal(scale)) * to_scale);
        S::store(to + p.stride, g.value);
    }
    return result;
  }

 private:
  static Vector clamp(const Transform& t, Vector v) { return S::min(S::max(v, (T)t.min_log_scale), (T)t.max_log_scale); }
};

}  // namespace jacobiflow
