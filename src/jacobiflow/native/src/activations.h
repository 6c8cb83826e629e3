// The activations of masked networks, and their derivatives.
#pragma once

#include "boundary.h"
#include "vector_math.h"

namespace jacobiflow {

// Returns whether the derivative has to be stored. Otherwise the value gives it.
inline bool needs_slopes(Activation function) {
  switch (function) {
    case Activation::identity:
    case Activation::relu:
    case Activation::tanh:
    case Activation::sigmoid: return false;
    default: return true;
  }
}

// Writes the activation of `size` numbers to `out`, and its derivatives to `slopes` unless that is null.
template <typename T>
void activate(const Operation& o, const T* in, T* out, T* slopes, size_t size) {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  const T slope = (T)o.negative_slope, alpha = (T)o.alpha, beta = (T)o.beta, threshold = (T)o.threshold;
  const auto each = [&](const auto& function, const auto& derivative) {
    for (size_t i = 0; i < size; i += S::lanes) {
      const Vector v = S::load(in + i), y = function(v);
      S::store(out + i, y);
      if (slopes) S::store(slopes + i, derivative(v, y));
    }
  };
  const auto from_value = [](Vector, Vector y) { return y; };
  const Vector one = S::broadcast(1);
  switch (o.activation) {
    case Activation::identity: return each([](Vector v) { return v; }, from_value);
    case Activation::relu: return each([](Vector v) { return S::max(v, 0); }, from_value);
    case Activation::tanh: return each([](Vector v) { return S::tanh(v); }, from_value);
    case Activation::sigmoid: return each([](Vector v) { return S::sigmoid(v); }, from_value);
    case Activation::leaky_relu:
      return each([&](Vector v) { return v < T(0) ? v * slope : v; },
                  [&](Vector v, Vector) { return v > T(0) ? one : one * slope; });
    case Activation::elu:
      return each([&](Vector v) { return v < T(0) ? S::expm1(v) * alpha : v; },
                  [&](Vector v, Vector) { return v > T(0) ? one : S::exp(v) * alpha; });
    case Activation::selu: {
      constexpr T selu_alpha = 1.6732632423543772848, scale = 1.0507009873554804934;
      return each([](Vector v) { return (v < T(0) ? S::expm1(v) * selu_alpha : v) * scale; },
                  [&](Vector v, Vector) { return (v > T(0) ? one : S::exp(v) * selu_alpha) * scale; });
    }
    case Activation::silu:
      return each([](Vector v) { return S::silu(v); },
                  [](Vector v, Vector y) { return S::sigmoid(v) * (T(1) + v - y); });
    case Activation::gelu:
      return each([](Vector v) { return S::gelu(v); },
                  [](Vector v, Vector) {
                    return S::normal_cdf(v) + v * S::exp(v * v * T(-0.5)) * T(0.39894228040143267794);
                  });
    case Activation::gelu_tanh: {
      constexpr T c = 0.044715, k = 0.79788456080286535588;
      const auto curve = [](Vector v) { return S::tanh((v + v * v * v * c) * k); };
      return each([&](Vector v) { return v * T(0.5) * (curve(v) + T(1)); },
                  [&](Vector v, Vector) {
                    const Vector t = curve(v);
                    return T(0.5) * ((T(1) + t) + v * (T(1) - t * t) * k * (T(1) + v * v * (3 * c)));
                  });
    }
    case Activation::softplus:
      return each([&](Vector v) { return S::softplus(v, beta, threshold); },
                  [&](Vector v, Vector) { return v * beta > threshold ? one : S::sigmoid(v * beta); });
  }
}

// Multiplies gradients by the derivative, which the activation's values give, or `slopes` as `activate` has written them.
template <typename T>
void multiply_by_slopes(Activation function, const T* values, const T* slopes, T* g, size_t size) {
  using S = Simd<T>;
  using Vector = typename S::Vector;
  const auto each = [&](const T* from, const auto& multiply) {
    for (size_t i = 0; i < size; i += S::lanes) S::store(g + i, multiply(S::load(from + i), S::load(g + i)));
  };
  switch (function) {
    case Activation::identity: return;
    case Activation::relu: return each(values, [](Vector y, Vector g) { return y > T(0) ? g : Vector{}; });
    case Activation::tanh: return each(values, [](Vector y, Vector g) { return g * (T(1) - y * y); });
    case Activation::sigmoid: return each(values, [](Vector y, Vector g) { return g * (y * (T(1) - y)); });
    default: return each(slopes, [](Vector slope, Vector g) { return g * slope; });
  }
}

}  // namespace jacobiflow
