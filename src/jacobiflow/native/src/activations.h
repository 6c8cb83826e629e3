// The activations of masked networks, and their derivatives.
#pragma once

#include "boundary.h"
#include "lanes.h"

namespace jacobiflow {

// Whether the derivative is computed before the value is lost; otherwise the value tells it.
inline bool needs_slopes(Activation function) {
  switch (function) {
    case Activation::identity:
    case Activation::relu:
    case Activation::tanh:
    case Activation::sigmoid: return false;
    default: return true;
  }
}

// Replaces vectors v of `size` numbers by function(v), and writes the derivatives to `slopes` unless it is null.
template <typename T>
void activate(const Operation& o, const T* in, T* out, T* slopes, size_t size) {
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  const T a = (T)o.first, b = (T)o.second;
  const auto each = [&](const auto& function, const auto& derivative) {
    for (size_t i = 0; i < size; i += L::count) {
      const Vector v = L::load(in + i), y = function(v);
      L::store(out + i, y);
      if (slopes) L::store(slopes + i, derivative(v, y));
    }
  };
  const auto from_value = [](Vector, Vector y) { return y; };
  const Vector one = L::spread(1);
  switch (o.function) {
    case Activation::identity: return each([](Vector v) { return v; }, from_value);
    case Activation::relu: return each([](Vector v) { return L::max(v, 0); }, from_value);
    case Activation::tanh: return each([](Vector v) { return L::tanh(v); }, from_value);
    case Activation::sigmoid: return each([](Vector v) { return L::sigmoid(v); }, from_value);
    case Activation::leaky_relu:
      return each([&](Vector v) { return v < T(0) ? v * a : v; }, [&](Vector v, Vector) { return v > T(0) ? one : one * a; });
    case Activation::elu:
      return each([&](Vector v) { return v < T(0) ? L::expm1(v) * a : v; },
                  [&](Vector v, Vector) { return v > T(0) ? one : L::exp(v) * a; });
    case Activation::selu: {
      constexpr T alpha = 1.6732632423543772848, scale = 1.0507009873554804934;
      return each([](Vector v) { return (v < T(0) ? L::expm1(v) * alpha : v) * scale; },
                  [&](Vector v, Vector) { return (v > T(0) ? one : L::exp(v) * alpha) * scale; });
    }
    case Activation::silu:
      return each([](Vector v) { return L::silu(v); },
                  [](Vector v, Vector y) { return L::sigmoid(v) * (T(1) + v - y); });
    case Activation::gelu:
      return each([](Vector v) { return L::gelu(v); },
                  [](Vector v, Vector) { return L::normal_cdf(v) + v * L::exp(v * v * T(-0.5)) * T(0.39894228040143267794); });
    case Activation::gelu_tanh: {
      constexpr T c = 0.044715, k = 0.79788456080286535588;
      const auto curve = [](Vector v) { return L::tanh((v + v * v * v * c) * k); };
      return each([&](Vector v) { return v * T(0.5) * (curve(v) + T(1)); },
                  [&](Vector v, Vector) {
                    const Vector t = curve(v);
                    return T(0.5) * ((T(1) + t) + v * (T(1) - t * t) * k * (T(1) + v * v * (3 * c)));
                  });
    }
    case Activation::softplus:
      return each([&](Vector v) { return L::softplus(v, a, b); },
                  [&](Vector v, Vector) { return v * a > b ? one : L::sigmoid(v * a); });
  }
}

// Multiplies gradients of function(v) by the derivative, from the values or from what `activate` wrote to `slopes`.
template <typename T>
void multiply_by_slopes(Activation function, const T* values, const T* slopes, T* g, size_t size) {
  using L = Lanes<T>;
  using Vector = typename L::Vector;
  const auto each = [&](const T* from, const auto& multiply) {
    for (size_t i = 0; i < size; i += L::count) L::store(g + i, multiply(L::load(from + i), L::load(g + i)));
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
