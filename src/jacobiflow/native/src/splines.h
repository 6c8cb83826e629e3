// Rational splines of one feature, on vectors of rows, and their gradients.
#pragma once

#include "affine.h"

namespace jacobiflow {

// A spline of one feature. `memory` has room for two vectors per bin.
template <typename T>
class Spline {
 public:
  using S = Simd<T>;
  using Vector = typename S::Vector;
  using Mask = typename S::Mask;

  Spline(const Transform& t, const Parameters<T>& p, bool inverts, T* memory)
      : t(t), p(p), inverts(inverts), is_linear(t.kind == TransformKind::rational_linear), widths(memory),
        heights(memory + (size_t)t.bins * S::lanes) {}

  // Transforms x, or y if the spline is inverted. Sets the logarithm of dy/dx if it is wanted. Without tails, an input outside
  // of the spline makes `non_finite` NaN.
  Vector apply(Vector in, bool wants_log_slope, Vector& log_slope, Vector& non_finite) {
    const T low = (T)t.low, size = (T)t.high - low;
    if (t.is_circular && !inverts) in = S::remainder(in, size) + low;
    find_bin(in, inverts);
    Vector out = is_linear ? linear(in, wants_log_slope, log_slope) : quadratic(in, wants_log_slope, log_slope);
    log_slope = is_in ? log_slope : Vector{};
    if (!t.has_tails) non_finite = is_in ? non_finite : S::broadcast(S::nan);
    out = is_in ? out : in;
    return t.is_circular && inverts ? S::remainder(out, size) + low : out;
  }

  // Writes the gradients of the parameters to `to`, and returns the gradient of the input. `g` has those of the result at x.
  Vector differentiate(Vector x, Gradients<Vector> g, T* to) {
    const Vector outside = g.value;
    if (t.is_circular) x = S::remainder(x, (T)t.high - (T)t.low) + (T)t.low;
    find_bin(x, false);
    x = is_in ? x : x0;  // a gradient of 0 times an overflow would be NaN
    g = {is_in ? g.value : Vector{}, is_in ? g.log_slope : Vector{}};
    BinGradients c{};
    const Vector result = is_linear ? differentiate_linear(x, g, c) : differentiate_quadratic(x, g, c);
    const Vector to_first = t.is_soft_clipped ? d0 * square(soft_clip(raw0)) : softplus_slope(raw0);
    const Vector to_second = t.is_soft_clipped ? d1 * square(soft_clip(raw1)) : softplus_slope(raw1);
    write_size_gradients(widths, width_sum, x0, width, (T)t.min_width, c.x0, c.width, 0, to);
    write_size_gradients(heights, height_sum, y0, height, (T)t.min_height, c.y0, c.height, t.bins,
                         to + (size_t)t.bins * p.stride);
    write_derivative_gradients(c.d0 * to_first, c.d1 * to_second, to + (size_t)2 * t.bins * p.stride);
    if (is_linear)
      for (int k = 0; k < t.bins; k++)
        S::store(to + (size_t)(3 * t.bins - 1 + k) * p.stride, bin == T(k) ? c.lambda : Vector{});
    return is_in ? result : outside;
  }

 private:
  // Gradients of the corner of a bin, its size, the derivatives at its ends, and its parameter lambda.
  struct BinGradients {
    Vector x0, y0, width, height, d0, d1, lambda;
  };

  const Transform& t;
  const Parameters<T> p;
  const bool inverts, is_linear;
  T *const widths, *const heights;
  // The bin of each row: its index, corner, size, parameters, derivatives at the ends, and mean slope.
  Vector bin, x0, y0, width, height, raw0, raw1, raw_lambda, d0, d1, delta, width_sum, height_sum;
  Mask is_in;

  static Vector square(Vector v) { return v * v; }
  Vector soft_clip(Vector raw) const { return S::reciprocal(S::abs(raw) * (T)t.clip + T(1)); }
  static Vector softplus_slope(Vector raw) { return raw > T(20) ? S::broadcast(1) : S::sigmoid(raw); }

  void find_bin(Vector in, bool by_height) {
    const int K = t.bins;
    const T low = (T)t.low, size = (T)t.high - low, gap = (T)t.edge_margin;
    const T min_width = (T)t.min_width, min_height = (T)t.min_height;
    width_sum = exponentials(0, widths), height_sum = exponentials(K, heights);
    const Vector to_width = size * (1 - min_width * K) / width_sum, to_height = size * (1 - min_height * K) / height_sum;
    is_in = (in >= low) & (in <= (T)t.high);
    Vector x = S::broadcast(low), y = x;
    x0 = y0 = x, bin = Vector{};
    for (int k = 0; k < K; k++) {
      const Vector w = S::load(widths + (size_t)k * S::lanes) * to_width + size * min_width;
      const Vector h = S::load(heights + (size_t)k * S::lanes) * to_height + size * min_height;
      const Vector left = derivative(k), right = derivative(k + 1);
      if (k == 0) {
        width = w, height = h, raw0 = left, raw1 = right;
        if (is_linear) raw_lambda = p[3 * K - 1];
      } else {
        const Mask here = in >= (by_height ? y : x) + gap;
        x0 = here ? x : x0, y0 = here ? y : y0, width = here ? w : width, height = here ? h : height;
        raw0 = here ? left : raw0, raw1 = here ? right : raw1, bin = here ? S::broadcast(k) : bin;
        if (is_linear) raw_lambda = here ? p[3 * K - 1 + k] : raw_lambda;
      }
      x += w, y += h;
    }
    d0 = slope(raw0, bin == T(0)), d1 = slope(raw1, bin == T(K - 1)), delta = height / width;
  }

  // Writes exp(parameter - maximum) and returns the sum. Soft-clipped parameters are small, so nothing is subtracted.
  Vector exponentials(int first, T* out) const {
    const int K = t.bins;
    const T factor = (T)t.logit_scale, clip = T(2) * (T)t.clip;
    Vector most = S::broadcast(-S::infinity), total{};
    if (t.is_soft_clipped) {
      for (int k = 0; k < K; k++) {
        const Vector raw = p[first + k], e = S::exp_of_small(raw * S::reciprocal(S::abs(raw) * clip + T(1)));
        S::store(out + (size_t)k * S::lanes, e);
        total += e;
      }
      return total;
    }
    for (int k = 0; k < K; k++) {
      const Vector raw = p[first + k] * factor;
      most = raw > most ? raw : most;
    }
    for (int k = 0; k < K; k++) {
      const Vector e = S::exp_of_small(p[first + k] * factor - most);
      S::store(out + (size_t)k * S::lanes, e);
      total += e;
    }
    return total;
  }

  // Returns the index of the parameter of the derivative at knot k of K + 1, or -1 if an end has a fixed one.
  int derivative_index(int k) const {
    if (t.boundary == SplineBoundary::free) return k;
    if (t.boundary == SplineBoundary::circular) return k % t.bins;
    return k == 0 || k == t.bins ? -1 : k - 1;
  }

  Vector derivative(int k) const {
    const int index = derivative_index(k);
    return index < 0 ? Vector{} : p[2 * t.bins + index];
  }

  Vector slope(Vector raw, Mask is_end) const {
    const Vector inner = t.is_soft_clipped ? S::exp_of_small(raw * soft_clip(raw))
                                           : S::softplus(raw, 1, 20) + (T)t.min_slope;
    return t.boundary == SplineBoundary::fixed ? (is_end ? S::broadcast((T)t.end_slope) : inner) : inner;
  }

  Vector quadratic(Vector in, bool wants_log_slope, Vector& log_slope) const {
    const Vector bend = d0 + d1 - delta * T(2);
    Vector theta, out;
    if (inverts) {
      const Vector rise = in - y0, b = height * d0 - rise * bend, a = height * (delta - d0) + rise * bend, c = -delta * rise;
      const Vector square = b * b - a * c * T(4);
      theta = c * T(2) / (-b - S::sqrt(S::max(square, 0)));
      out = theta * width + x0;
    } else {
      theta = (in - x0) / width;
    }
    const Vector rest = T(1) - theta, mixed = theta * rest, denominator = delta + bend * mixed;
    if (!inverts) out = y0 + height * (delta * theta * theta + d0 * mixed) / denominator;
    if (wants_log_slope)
      log_slope = S::log(delta * delta * (d1 * theta * theta + delta * mixed * T(2) + d0 * rest * rest) /
                         (denominator * denominator));
    return out;
  }

  // Uses y = y0 + height P / Q and dy/dx = delta^2 N / Q^2, as in `quadratic`.
  Vector differentiate_quadratic(Vector x, Gradients<Vector> g, BinGradients& c) const {
    const Vector to_theta = S::reciprocal(width), theta = (x - x0) * to_theta, rest = T(1) - theta, mixed = theta * rest;
    const Vector bend = d0 + d1 - delta * T(2), q = S::reciprocal(delta + bend * mixed);
    const Vector P = delta * theta * theta + d0 * mixed;
    const Vector N = d1 * theta * theta + delta * mixed * T(2) + d0 * rest * rest, to_log = S::reciprocal(N);
    const Vector N_bend = T(2) * (d1 * theta + delta * (rest - theta) - d0 * rest), Q_bend = bend * (rest - theta);
    Vector result;
    if (inverts) {
      result = inverse_gradient(g, square(delta * q) * N, (to_log * N_bend - T(2) * q * Q_bend) * to_theta);
      g = {-result, -g.log_slope};
    }
    const Vector gP = g.value * height * q, gQ = -q * (gP * P + T(2) * g.log_slope), gN = g.log_slope * to_log;
    const Vector g_delta = gP * theta * theta + gQ * (T(1) - T(2) * mixed) +
                           T(2) * (gN * mixed + g.log_slope * S::reciprocal(delta));
    const Vector g_theta = gP * (T(2) * delta * theta + d0 * (rest - theta)) + gQ * Q_bend + gN * N_bend;
    const Vector gx = g_theta * to_theta;
    c.x0 = -gx, c.y0 = g.value;
    c.width = -(g_delta * delta + g_theta * theta) * to_theta, c.height = g.value * P * q + g_delta * to_theta;
    c.d0 = (gP + gQ) * mixed + gN * rest * rest, c.d1 = gQ * mixed + gN * theta * theta;
    return inverts ? result : gx;
  }

  // Joins two ratios of linear functions at (x0 + lambda width, middle).
  Vector linear(Vector in, bool wants_log_slope, Vector& log_slope) const {
    const Vector lambda = S::sigmoid(raw_lambda) * T(0.95) + T(0.025), rest = T(1) - lambda;
    const Vector wb = S::sqrt(d0 / d1), wc = (lambda * d0 + rest * wb * d1) / delta, y1 = y0 + height;
    const Vector middle = (rest * y0 + lambda * wb * y1) / (rest + lambda * wb);
    Vector theta, out, denominator;
    Mask is_left;
    if (inverts) {
      is_left = in <= middle;
      denominator = is_left ? (wc - T(1)) * in + y0 - wc * middle : (wc - wb) * in + wb * y1 - wc * middle;
      const Vector numerator = is_left ? lambda * (y0 - in) : (wc - lambda * wb) * in + lambda * wb * y1 - wc * middle;
      out = numerator / denominator * width + x0;
    } else {
      theta = (in - x0) / width;
      is_left = theta <= lambda;
      denominator = is_left ? lambda - theta + wc * theta : wc * (T(1) - theta) + wb * (theta - lambda);
      out = (is_left ? y0 * (lambda - theta) + wc * middle * theta
                     : wc * middle * (T(1) - theta) + wb * y1 * (theta - lambda)) / denominator;
    }
    if (wants_log_slope) {
      const Vector numerator = is_left ? wc * lambda * (middle - y0) : wb * wc * rest * (y1 - middle);
      log_slope = inverts ? -S::log(numerator * width / square(denominator))
                          : S::log(numerator / (width * square(denominator)));
    }
    return out;
  }

  // Uses y = y0 + A / D and dy/dx = N / (width D^2), as in `linear`, with rise = middle - y0.
  Vector differentiate_linear(Vector x, Gradients<Vector> g, BinGradients& c) const {
    const Vector s = S::sigmoid(raw_lambda), lambda = s * T(0.95) + T(0.025), rest = T(1) - lambda;
    const Vector wb = S::sqrt(d0 / d1), wc = (lambda * d0 + rest * wb * d1) / delta, share = rest + lambda * wb;
    const Vector rise = lambda * wb * height / share;
    const Vector theta = (x - x0) / width, right = T(1) - theta, beyond = theta - lambda;
    const Mask is_left = theta <= lambda;
    const Vector A = is_left ? wc * rise * theta : wc * rise * right + wb * height * beyond;
    const Vector D = is_left ? wc * theta - beyond : wc * right + wb * beyond;
    const Vector N = is_left ? wc * lambda * rise : wb * wc * rest * (height - rise);
    const Vector D_bend = is_left ? wc - T(1) : wb - wc;
    Vector result;
    if (inverts) {
      result = inverse_gradient(g, N / (width * D * D), T(-2) * D_bend / (D * width));
      g = {-result, -g.log_slope};
    }
    const Vector gl = g.log_slope, gA = g.value / D, gD = -(gA * A + T(2) * gl) / D;
    const Vector g_theta = gA * (is_left ? wc * rise : wb * height - wc * rise) + gD * D_bend;
    const Vector g_rise = gA * wc * (is_left ? theta : right) + (is_left ? gl / rise : -gl / (height - rise));
    const Vector g_wc = (gA * rise + gD) * (is_left ? theta : right) + gl / wc;
    Vector g_wb = is_left ? Vector{} : (gA * height + gD) * beyond + gl / wb;
    Vector g_lambda = is_left ? gD + gl / lambda : -(gA * wb * height + gD * wb + gl / rest);
    g_lambda += g_rise * (wb * height - rise * (wb - T(1))) / share + g_wc * (d0 - wb * d1) / delta;
    g_wb += g_rise * lambda * (height - rise) / share + g_wc * rest * d1 / delta;
    const Vector g_delta = -g_wc * wc / delta, gx = g_theta / width;
    c.x0 = -gx, c.y0 = g.value;
    c.width = -(gl + g_theta * theta + g_delta * delta) / width;
    c.height = (is_left ? Vector{} : gA * wb * beyond + gl / (height - rise)) + g_rise * rise / height + g_delta / width;
    c.d0 = g_wc * lambda / delta + g_wb * wb / (T(2) * d0), c.d1 = g_wc * rest * wb / delta - g_wb * wb / (T(2) * d1);
    c.lambda = g_lambda * T(0.95) * s * (T(1) - s);
    return inverts ? result : gx;
  }

  // Writes the gradients of the parameters of all widths, or heights, from those of the start and size of the row's bin.
  void write_size_gradients(const T* sizes, Vector sum, Vector start, Vector size, T least, Vector g_start, Vector g_size,
                            int first, T* to) const {
    const T total = (T)t.high - (T)t.low, shared = total * (1 - least * t.bins);
    const Vector to_share = T(1) / sum;
    const Vector mean = (g_start * (start - (T)t.low - bin * (total * least)) + g_size * (size - total * least)) / shared;
    const T clip = T(2) * (T)t.clip;
    for (int k = 0; k < t.bins; k++) {
      const Vector g = bin > T(k) ? g_start : (bin == T(k) ? g_size : Vector{});
      Vector to_parameter = S::broadcast((T)t.logit_scale);
      if (t.is_soft_clipped) to_parameter = square(S::reciprocal(S::abs(p[first + k]) * clip + T(1)));
      const Vector share = S::load(sizes + (size_t)k * S::lanes) * to_share;
      S::store(to + (size_t)k * p.stride, shared * share * (g - mean) * to_parameter);
    }
  }

  // Writes the gradients of the parameters of the derivatives, from those at the ends of the row's bin.
  void write_derivative_gradients(Vector first, Vector second, T* to) const {
    for (int k = 0; k <= t.bins; k++) {
      const int index = derivative_index(k);
      if (index < 0) continue;
      Vector g = (bin == T(k) ? first : Vector{}) + (bin == T(k - 1) ? second : Vector{});
      if (t.boundary == SplineBoundary::circular && k == t.bins) g += S::load(to);  // the first knot again
      S::store(to + (size_t)index * p.stride, g);
    }
  }
};

}  // namespace jacobiflow
