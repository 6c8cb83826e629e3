// The backward pass of a chain on a tile of rows: gradients of the rows, their contexts and the tensors.
#pragma once

#include "tensor_gradients.h"

namespace jacobiflow {

// Returns the number of units of a tile's memory.
template <typename T>
size_t gradient_units(const Chain<T>& chain, const TensorGradients<T>& tensors) {
  return (size_t)3 * chain.call.features + 2 * chain.call.context_features + chain.max_gradient_units + tensors.max_inputs +
         2 * chain.feature_units();
}

// Computes the gradients of a tile of `vectors` vectors of rows in one thread. They have the layout of the values.
template <typename T, int vectors>
class BackwardTile {
 public:
  using S = Simd<T>;
  using Vector = typename S::Vector;
  static constexpr int rows = S::lanes * vectors;

  // `memory` has `gradient_units` units, and `sums` are those of this thread in `tensors`.
  BackwardTile(const Chain<T>& chain, const GradientArgs& args, const TensorGradients<T>& tensors, T* sums, T* memory)
      : chain(chain), call(chain.call), args(args), tensors(tensors), sums(sums), features(memory),
        copy(features + (size_t)call.features * rows), log_det(copy + (size_t)call.features * rows),
        context(log_det + (size_t)call.features * rows), context_gradient(context + (size_t)call.context_features * rows),
        gradients(context_gradient + (size_t)call.context_features * rows),
        transposed(gradients + chain.max_gradient_units * rows),
        feature_memory(transposed + (size_t)tensors.max_inputs * rows) {}

  // Adds the gradients of rows [first, first + count), whose values the forward direction has left in `activations`.
  void run(int64_t first, int count, const T* activations) {
    values = activations;
    const int by_feature = call.is_by_feature ? call.features : 1;
    load(args.grad_out, first, call.features, count, features);
    load(args.grad_log_det, first, by_feature, count, log_det);
    if (call.context_features)
      load_rows(static_cast<const T*>(call.context) + first * call.context_stride, call.context_stride,
                call.context_features, count, rows, context);
    std::memset(context_gradient, 0, sizeof(T) * call.context_features * rows);
    for (int i = call.count - 1; i >= 0; i--) {
      index = call.is_inverse ? call.count - 1 - i : i;
      const Transform& t = call.transforms[index];
      inverts = chain.inverts(t);
      needs_features = i > 0 || args.grad_input || inverts;
      if (t.kind == TransformKind::permutation)
        permute(t, !inverts, rows, features, copy);
      else if (t.kind == TransformKind::soft_clip)
        differentiate_soft_clip(t);
      else if (t.kind == TransformKind::lu_linear)
        differentiate_lu(t);
      else if (is_constant(t))
        differentiate_constant(t);
      else if (!t.num_operations)
        differentiate_unconditional(t);
      else
        masked(t);
    }
    if (args.grad_input)
      store_rows(features, call.features, count, rows, static_cast<T*>(args.grad_input) + first * call.features);
    if (args.grad_context)
      store_rows(context_gradient, call.context_features, count, rows,
                 static_cast<T*>(args.grad_context) + first * call.context_features);
  }

 private:
  const Chain<T>& chain;
  const ChainArgs& call;
  const GradientArgs& args;
  const TensorGradients<T>& tensors;
  T *const sums, *const features, *const copy, *const log_det, *const context, *const context_gradient, *const gradients;
  T *const transposed, *const feature_memory;
  const T* values = nullptr;  // the tile's activations
  int index = 0;              // index of the current transform
  bool inverts = false, needs_features = false;

  // Loads (count, columns), or zeros from null. Rows beyond `count` are 0, so that they add nothing to sums.
  static void load(const void* from, int64_t first, int columns, int count, T* to) {
    std::memset(to, 0, sizeof(T) * columns * rows);
    const T* values = static_cast<const T*>(from);
    for (int column = 0; values && column < columns; column++)
      for (int row = 0; row < count; row++) to[(size_t)column * rows + row] = values[(first + row) * columns + column];
  }

  Vector log_det_of(int feature, int v) const {
    return S::load(log_det + (size_t)(call.is_by_feature ? feature : 0) * rows + v * S::lanes);
  }

  // Return the values of this transform, the derivatives of activations, and the gradients of both.
  const T* value_of(int value) const { return values + chain.value(index, value) * rows; }
  T* gradient_of(int value) { return gradients + chain.gradient(index, value) * rows; }
  const T* slopes_of(const OperationLayout& layout) const { return values + layout.slopes * rows; }
  T* context_layer_gradient(const OperationLayout& layout) { return gradients + layout.layer_gradient * rows; }

  void differentiate_unconditional(const Transform& t) {
    const OperationLayout& layout = chain.of(index, 0);
    const GradientLayout& to = tensors.of(index, 0);
    const T *scales = chain.weight(layout), *shifts = chain.bias(layout);
    for (int f = 0; f < call.features; f++) {
      const T scale = scales[f], shift = shifts[f];
      Vector of_scale{}, of_shift{};
      for (int v = 0; v < vectors; v++) {
        T* at = features + (size_t)f * rows + v * S::lanes;
        const Vector x = S::load(value_of(0) + (size_t)f * rows + v * S::lanes);
        Gradients<Vector> g{S::load(at), log_det_of(f, v)};
        if (t.kind == TransformKind::normal) {
          if (inverts) g.log_slope = -g.log_slope;
          const Vector standard = (x - shift) / scale, change = g.log_slope * standard / scale;
          S::store(at, g.value - change);
          of_shift += change;
          of_scale += change * standard - g.log_slope / scale;
        } else {
          const Vector result = inverts ? g.value / scale : g.value * scale;
          if (inverts) g = {-result, -g.log_slope};
          S::store(at, result);
          of_shift += g.value;
          of_scale += g.value * x + g.log_slope / scale;
        }
      }
      if (to.has_any) {
        add_to(sums + to.weight + (size_t)f * S::lanes, of_scale);
        add_to(sums + to.bias + (size_t)f * S::lanes, of_shift);
      }
    }
  }

  // Of features whose parameters are in tensors.
  void differentiate_constant(const Transform& t) {
    T *parameters = feature_memory + (size_t)2 * chain.max_bins * rows, *to = parameters + (size_t)t.parameters * rows;
    for (int i = t.identity; i < t.features; i++) {
      const int feature = i - t.identity;
      chain.each_parameter(index, feature, [&](int p, T value, int, int) {
        std::fill_n(parameters + (size_t)p * rows, rows, value);
      });
      differentiate_feature(t, i, parameters, to);
      chain.each_parameter(index, feature, [&](int p, T, int tensor, int column) {
        const GradientLayout& s = tensors.of(index, tensor);
        if (!s.has_any) return;
        Vector sum{};
        for (int v = 0; v < vectors; v++) sum += S::load(to + (size_t)p * rows + v * S::lanes);
        sums[s.weight + (size_t)feature * s.stride + column] += S::sum(sum);
      });
    }
  }

  // Of y = L (U x) + shift, a gradient g of y gives L the gradient g (U x)^T, U the gradient (L^T g) x^T, and x the gradient
  // U^T L^T g. Of the inverse, a gradient g of x gives y the gradient h = L^-T U^-T g, L -h (U x)^T, and U -(U^-T g) x^T.
  void differentiate_lu(const Transform& t) {
    const auto upper = chain.template triangle<vectors>(index, false), lower = chain.template triangle<vectors>(index, true);
    const GradientLayout &of_upper = tensors.of(index, 0), &of_lower = tensors.of(index, 1);
    const int D = t.features;
    const auto read_all = [&](int) { return D; };
    const T* x = value_of(0);
    T *g = features, *other = copy;
    const auto add_lower = [&] {
      if (!of_lower.has_any) return;
      upper.multiply(x, other);
      add_products(g, D, other, D, read_all, of_lower);
    };
    const auto add_upper = [&] {
      if (of_upper.has_any) add_products(g, D, x, D, read_all, of_upper);
    };
    const auto negate = [&] {
      for (size_t i = 0; i < (size_t)D * rows; i += S::lanes) S::store(g + i, -S::load(g + i));
    };
    if (inverts) {
      negate();
      upper.transposed().solve(g);
      add_upper();
      lower.transposed().solve(g);
      add_lower();
      negate();
    } else {
      add_lower();
      lower.transposed().multiply(g, other);
      std::swap(g, other);
      add_upper();
      upper.transposed().multiply(g, other);
    }
    if (!of_upper.has_any) return;
    Vector of_log_det{};  // the sum of the logarithms of U's diagonal
    for (int v = 0; v < vectors; v++) of_log_det += log_det_of(0, v);
    for (int i = 0; i < D; i++)
      sums[of_upper.weight + (size_t)i * (of_upper.stride + 1)] +=
          S::sum(inverts ? -of_log_det : of_log_det) / upper.matrix.entries[(size_t)i * (D + 1)];
  }

  void differentiate_soft_clip(const Transform& t) {
    for (int f = 0; f < call.features; f++)
      for (int v = 0; v < vectors; v++) {
        T* at = features + (size_t)f * rows + v * S::lanes;
        const Vector x = S::load(value_of(0) + (size_t)f * rows + v * S::lanes), to_share = S::abs(x) / (T)t.high + T(1);
        const Vector slope = T(1) / (to_share * to_share), size = T(-2) / (to_share * (T)t.high);
        const Vector bend = x > T(0) ? size : (x < T(0) ? -size : Vector{});
        const Gradients<Vector> g{S::load(at), log_det_of(f, v)};
        S::store(at, inverts ? inverse_gradient(g, slope, bend) : g.value * slope + g.log_slope * bend);
      }
  }

  static void add_to(T* at, Vector v) { S::store(at, S::load(at) + v); }

  // Goes from the last step to the first. If the transform was inverted, this solves J^T v = g, as J is triangular: the terms
  // that later features add to the gradient of a feature are known before it is needed.
  void masked(const Transform& t) {
    std::memset(gradient_of(0), 0, sizeof(T) * chain.units(t, 0) * rows);
    const int length = chain.lengths[index];
    for (int begin = (t.steps - 1) / length * length; begin >= 0; begin -= length) {
      const int end = std::min(begin + length, t.steps);
      for (int i = t.starts[begin]; i < t.starts[end]; i++) {
        if (inverts && i < t.inputs) add_input_gradient(t, i);
        const size_t first = (size_t)(i - t.identity) * t.parameters * rows;
        if (i >= t.identity)
          differentiate_feature(t, i, value_of(t.num_operations) + first, gradient_of(t.num_operations) + first);
      }
      backpropagate(t, begin, end);
    }
    if (!inverts && needs_features)
      for (int i = 0; i < t.inputs; i++) add_input_gradient(t, i);
    if (args.grad_context) add_context_gradients(t);
    for (int j = 0; j < t.num_operations; j++)
      if (tensors.of(index, j).has_any) add_weight_gradients(t, j);
  }

  // Replaces the gradient of the i-th feature, and writes those of its parameters.
  void differentiate_feature(const Transform& t, int i, const T* parameters, T* parameter_gradients) {
    with_feature_transform<T>(t, inverts, feature_memory, [&](const auto& make) {
      for (int v = 0; v < vectors; v++) {
        T* at = features + (size_t)t.order[i] * rows + v * S::lanes;
        const Vector x = S::load(value_of(0) + (size_t)(t.context + i) * rows + v * S::lanes);
        const Gradients<Vector> g{S::load(at), log_det_of(t.order[i], v)};
        auto transform = make({parameters + v * S::lanes, rows});
        S::store(at, transform.differentiate(x, g, parameter_gradients + v * S::lanes));
      }
    });
  }

  // Adds the gradient of the network's input to that of the i-th feature.
  void add_input_gradient(const Transform& t, int i) {
    for (int v = 0; v < vectors; v++)
      add_to(features + (size_t)t.order[i] * rows + v * S::lanes,
             S::load(gradient_of(0) + (size_t)(t.context + i) * rows + v * S::lanes));
  }

  // Computes the gradients of all units of steps [begin, end) from those of the units that read them.
  void backpropagate(const Transform& t, int begin, int end) {
    for (int j = t.num_operations - 1; j >= 0; j--) {
      const Operation& o = t.operations[j];
      const OperationLayout& layout = chain.of(index, j);
      const int first = chain.ready(t, j + 1, begin - 1), last = chain.ready(t, j + 1, end - 1);
      const size_t at = (size_t)first * rows, size = (size_t)(last - first) * rows;
      T* g = gradient_of(j + 1) + at;
      const T *slopes = slopes_of(layout) + at, *weights = chain.bias(layout) + first;
      // Adds terms to the gradients of the same units of a value. Sets them if no later operation reads the value.
      const auto propagate = [&](int value, bool adds, const auto& term) {
        T* to = gradient_of(value) + at;
        for (size_t i = 0; i < size; i += S::lanes)
          S::store(to + i, term(i, S::load(g + i)) + (adds ? S::load(to + i) : Vector{}));
      };
      const auto unchanged = [](size_t, Vector g) { return g; };
      switch (o.kind) {
        case OperationKind::linear:
          multiply_by_slopes(o.activation, value_of(j + 1) + at, slopes, g, size);
          backpropagate_linear(t, j, begin, end);
          break;
        case OperationKind::activation:
          multiply_by_slopes(o.activation, value_of(j + 1) + at, slopes, g, size);
          propagate(o.source, layout.is_source_read_later, unchanged);
          break;
        case OperationKind::sum:
          propagate(o.source, layout.is_source_read_later, unchanged);
          propagate(o.other, layout.is_other_read_later, unchanged);
          break;
        case OperationKind::guidance:
          propagate(o.source, layout.is_source_read_later,
                    [&](size_t i, Vector g) { return g * (weights[i / rows] + T(1)); });
          propagate(o.other, layout.is_other_read_later, [&](size_t i, Vector g) { return -g * weights[i / rows]; });
          break;
        default: {  // add_context or gate_context
          const bool is_gate = o.kind == OperationKind::gate_context;
          T* of_layer = context_layer_gradient(layout) + at;
          const T* value = value_of(o.source) + at;
          for (size_t i = 0; i < size; i += S::lanes)
            S::store(of_layer + i, is_gate ? S::load(g + i) * S::load(value + i) : S::load(g + i));
          multiply_by_slopes(o.activation, slopes, slopes, of_layer, size);
          propagate(o.source, layout.is_source_read_later,
                    [&](size_t i, Vector g) { return is_gate ? g * S::load(slopes + i) : g; });
        }
      }
    }
  }

  // Computes weight^T g for the inputs of steps [begin, end).
  void backpropagate_linear(const Transform& t, int j, int begin, int end) {
    const Operation& o = t.operations[j];
    const OperationLayout& layout = chain.of(index, j);
    int first = chain.ready(t, o.source, begin - 1), last = chain.ready(t, o.source, end - 1);
    if (!o.source && !args.grad_context) first = std::max(first, t.context);
    if (!o.source && !needs_features) last = std::min(last, t.context);
    T* to = gradient_of(o.source) + (size_t)first * rows;
    const int all = o.ready[t.steps - 1];
    const bool adds = !o.source || layout.is_source_read_later;
    multiply<T, vectors>(
        Matrix<T>{chain.weight(layout), 1, layout.inputs}, first, last,
        [&](int input, int) { return Range{chain.readers(layout, input), all}; }, gradient_of(j + 1), to,
        [&](int unit, int v) { return adds ? S::load(to + (size_t)unit * rows + v * S::lanes) : Vector{}; },
        [](int, Vector sum) { return sum; });
  }

  void add_context_gradients(const Transform& t) {
    for (int i = 0; i < t.context; i++)
      for (int v = 0; v < vectors; v++)
        add_to(context_gradient + (size_t)(t.input_rows[i] - t.context_start) * rows + v * S::lanes,
               S::load(gradient_of(0) + (size_t)i * rows + v * S::lanes));
    for (int j = 0; j < t.num_operations; j++) {
      const Operation& o = t.operations[j];
      if (!reads_context(o)) continue;
      const OperationLayout& layout = chain.of(index, j);
      const Range units{0, o.ready[t.steps - 1]};
      T* to = context_gradient;
      multiply<T, vectors>(
          Matrix<T>{chain.weight(layout), 1, layout.inputs}, 0, layout.inputs, [&](int, int) { return units; },
          context_layer_gradient(layout), to,
          [&](int unit, int v) { return S::load(to + (size_t)unit * rows + v * S::lanes); },
          [](int, Vector sum) { return sum; });
    }
  }

  void add_weight_gradients(const Transform& t, int j) {
    const Operation& o = t.operations[j];
    const OperationLayout& layout = chain.of(index, j);
    const GradientLayout& s = tensors.of(index, j);
    const int all = o.ready[t.steps - 1];
    if (o.kind == OperationKind::linear)
      add_products(gradient_of(j + 1), all, value_of(o.source), chain.ready(t, o.source, t.steps - 1),
                   [&](int unit) { return chain.reads(layout, unit); }, s);
    else
      add_products(context_layer_gradient(layout), all, context, layout.inputs,
                   [&](int) { return layout.inputs; }, s);
  }

  // Adds g in^T to the sums of a weight, and g to those of its bias, for g (all, rows) and `in` (inputs, rows). A unit reads
  // the first read(unit) inputs.
  template <typename Read>
  void add_products(const T* g, int all, const T* in, int inputs, const Read& read, const GradientLayout& s) {
    transpose<T>(in, inputs, rows, transposed, s.stride);
    constexpr int count = sum_registers / 4;
    for (int unit = 0; unit < all; unit += count) {
      const int units = std::min(count, all - unit);
      add_outer_product(g + (size_t)unit * rows, transposed, units, read(unit + units - 1), rows, s.stride,
                        sums + s.weight + (size_t)unit * s.stride);
      for (int u = unit; u < unit + units; u++)
        for (int v = 0; v < vectors; v++)
          add_to(sums + s.bias + (size_t)u * S::lanes, S::load(g + (size_t)u * rows + v * S::lanes));
    }
  }
};

}  // namespace jacobiflow
