// The forward pass of a chain on a tile of rows, in either direction of the transforms.
#pragma once

#include "chain.h"
#include "tile.h"

namespace jacobiflow {

// Computes tiles of `vectors` vectors of rows in one thread.
template <typename T, int vectors>
class ForwardTile {
 public:
  using S = Simd<T>;
  using Vector = typename S::Vector;
  static constexpr int rows = S::lanes * vectors;

  // `memory` has the chain's `tile_units`.
  ForwardTile(const Chain<T>& chain, T* memory)
      : chain(chain), call(chain.call), memory(memory), features(memory), copy(at(call.features)),
        context(at((size_t)2 * call.features)), input(context + (size_t)call.context_features * rows),
        feature_memory(at(chain.tile_units - chain.feature_units())),
        constants(feature_memory + (size_t)2 * chain.max_bins * rows) {}

  // Computes rows [first, first + count), at most `rows`. Stores the values that the backward pass reads in `stored`
  // (units, rows), unless it is null. Writes the results if the call has memory for them.
  void run(int64_t first, int count, T* stored) {
    const T *in = static_cast<const T*>(call.input), *contexts = static_cast<const T*>(call.context);
    activations = stored;
    for (int v = 0; v < vectors; v++) log_det[v] = rounding[v] = non_finite[v] = Vector{};
    load_rows(in + first * call.in_stride, call.in_stride, call.features, count, rows, features);
    for (int f = 0; f < call.features; f++) check_finite(features + (size_t)f * rows);
    if (!chain.shares_context)
      load_rows(contexts + first * call.context_stride, call.context_stride, call.context_features, count, rows, context);
    for (int i = 0; i < call.count; i++) {
      index = call.is_inverse ? call.count - 1 - i : i;
      inverts = chain.inverts(call.transforms[index]);
      transform(call.transforms[index]);
    }
    if (call.out) write(first, count);
  }

 private:
  const Chain<T>& chain;
  const ChainArgs& call;
  T *const memory, *const features, *const copy, *const context, *const input, *const feature_memory;
  T* const constants;
  Vector log_det[vectors], rounding[vectors];
  Vector non_finite[vectors];  // NaN in lanes of rows that were not finite, else 0
  T* activations = nullptr;    // the values that the backward pass reads, or null
  int index = 0;               // index of the current transform
  bool inverts = false;

  T* at(size_t unit) const { return memory + unit * rows; }

  void check_finite(const T* values) {
    for (int v = 0; v < vectors; v++) non_finite[v] += S::load(values + v * S::lanes) * T(0);
  }

  // Writes the results. Those that have one number for each row go through the memory of the first feature.
  void write(int64_t first, int count) {
    for (int f = 0; f < call.features; f++) check_finite(features + (size_t)f * rows);
    store_rows(features, call.features, count, rows, static_cast<T*>(call.out) + first * call.features);
    for (int v = 0; v < vectors; v++) S::store(features + v * S::lanes, non_finite[v] + log_det[v] * T(0));
    for (int row = 0; row < count; row++) call.failed[first + row] = !(features[row] == 0);
    for (int v = 0; v < vectors; v++) S::store(features + v * S::lanes, log_det[v]);
    const int numbers = call.is_by_feature ? call.features : 1;  // of each row
    T* const log_dets = static_cast<T*>(call.log_det) + first * numbers;
    if (call.log_det) store_rows(call.is_by_feature ? copy : features, numbers, count, rows, log_dets);
  }

  void transform(const Transform& t) {
    if (t.kind == TransformKind::permutation)
      permute(t, inverts, rows, features, copy);
    else if (t.kind == TransformKind::soft_clip)
      soft_clip(t);
    else if (t.kind == TransformKind::lu_linear)
      transform_lu(t);
    else if (is_constant(t))
      constant(t);
    else if (t.num_operations)
      masked(t);
    else
      transform_unconditional(t);
  }

  // Adds to the log-determinant by Kahan's method, because sums over many features lose digits.
  void add(int v, Vector change) {
    const Vector term = change - rounding[v], total = log_det[v] + term;
    rounding[v] = (total - log_det[v]) - term;
    log_det[v] = total;
  }

  // Computes y = scale x + shift; or y = x, and adds the log-density of a normal distribution to the log-determinant.
  void transform_unconditional(const Transform& t) {
    const OperationLayout& layout = chain.of(index, 0);
    const T *scales = chain.weight(layout), *shifts = chain.bias(layout);
    for (int f = 0; f < call.features; f++) {
      const T scale = scales[f], shift = shifts[f];
      T* at = features + (size_t)f * rows;
      // The density of a normal distribution is NaN if its scale is negative, and its rows are left to the library.
      const T size = t.kind != TransformKind::normal && scale < 0 ? -scale : scale;
      const Vector log_scale = S::log(S::broadcast(size));
      for (int v = 0; v < vectors; v++, at += S::lanes) {
        const Vector in = S::load(at), standard = (in - shift) / scale;
        Vector x = in, out = inverts ? standard : in * scale + shift, change = log_scale;
        if (t.kind == TransformKind::normal) {
          out = in, change = standard * standard * T(-0.5) - log_scale - T(0.91893853320467274178);
        } else if (inverts) {
          x = out;
        }
        if (activations) S::store(activations + (size_t)(chain.inputs[index] + f) * rows + v * S::lanes, x);
        S::store(at, out);
        add(v, inverts ? -change : change);
      }
    }
  }

  // Computes y = L U x + shift, or the inverse.
  void transform_lu(const Transform& t) {
    const auto upper = chain.template triangle<vectors>(index, false), lower = chain.template triangle<vectors>(index, true);
    const T *shift = chain.bias(chain.of(index, 1)), *diagonal = upper.matrix.entries;
    const size_t size = (size_t)t.features * rows;
    T* x = features;
    const auto store = [&] {
      if (activations) copy_units(x, t.features, rows, activations + (size_t)chain.inputs[index] * rows);
    };
    if (inverts) {
      for (size_t i = 0; i < size; i += S::lanes) S::store(x + i, S::load(x + i) - shift[i / rows]);
      lower.solve(x);
      upper.solve(x);
      store();
    } else {
      store();
      upper.multiply(x, copy);
      lower.multiply(copy, x);
      for (size_t i = 0; i < size; i += S::lanes) S::store(x + i, S::load(x + i) + shift[i / rows]);
    }
    for (int i = 0; i < t.features; i++, diagonal += t.features + 1) {
      const Vector change = S::log(S::broadcast(*diagonal));
      for (int v = 0; v < vectors; v++) add(v, inverts ? -change : change);
    }
  }

  // Computes y = x / (1 + |x / high|). A row is left to the library if the inverse does not exist.
  void soft_clip(const Transform& t) {
    for (int f = 0; f < call.features; f++)
      for (int v = 0; v < vectors; v++) {
        T* at = features + (size_t)f * rows + v * S::lanes;
        const Vector in = S::load(at), share = S::abs(in) / (T)t.high, out = in / (inverts ? T(1) - share : T(1) + share);
        const Vector x = inverts ? out : in, change = S::log(S::abs(x) / (T)t.high + T(1)) * T(-2);
        if (inverts) non_finite[v] = share < T(1) ? non_finite[v] : S::broadcast(S::nan);
        if (activations) S::store(activations + (size_t)(chain.inputs[index] + f) * rows + v * S::lanes, x);
        S::store(at, out);
        add(v, inverts ? -change : change);
      }
  }

  // Returns the units of a value of this transform: all of them, or those of the current steps.
  T* units_of(int value) {
    if (has_stored(value)) return activations + chain.value(index, value) * rows;
    return value ? at(chain.of(index, value - 1).place) : input;
  }

  bool has_stored(int value) const { return activations && chain.is_stored(index, value); }
  bool has_all_units(const Transform& t, int value) const {
    return has_stored(value) || !value || t.operations[value - 1].is_kept;
  }

  // Computes some steps together, or step by step if the transform is inverted. Every `block_steps` steps of an inverse, one
  // matrix product adds what all earlier features contribute to later units.
  void masked(const Transform& t) {
    for (int i = 0; i < t.context && !chain.shares_context; i++)
      copy_units(context + (size_t)(t.input_rows[i] - t.context_start) * rows, 1, rows, units_of(0) + (size_t)i * rows);
    load_features(t);
    const int length = chain.lengths[index];
    for (int step = 0, begin = 0; step < t.steps; step += length) {
      const int end = std::min(step + length, t.steps);
      if (inverts && step && step % block_steps == 0) {
        begin = step;
        start_sums(t, begin, std::min(begin + block_steps, t.steps));
      }
      compute_units(t, step, end, begin);
      const int first = t.starts[step];
      for (int i = first; i < std::min(t.starts[end], t.identity); i++) keep_feature(t, i);
      // Without stored activations, the first parameters are those of the step's first feature.
      const T* parameters = units_of(t.num_operations);
      const int from = std::max(first, t.identity);
      for (int i = from; i < t.starts[end]; i++)
        transform_feature(t, i, parameters + (size_t)(i - (activations ? t.identity : from)) * t.parameters * rows);
    }
  }

  // Copies the features to the transform's input, unless they are not known yet.
  void load_features(const Transform& t) {
    for (int i = 0; i < t.features && !inverts; i++)
      copy_units(features + (size_t)t.order[i] * rows, 1, rows, units_of(0) + (size_t)(t.context + i) * rows);
  }

  // Transforms features whose parameters are in tensors.
  void constant(const Transform& t) {
    load_features(t);
    for (int i = 0; i < t.identity; i++) keep_feature(t, i);
    for (int i = t.identity; i < t.features; i++) {
      chain.each_parameter(index, i - t.identity, [&](int p, T value, int, int) {
        for (int v = 0; v < vectors; v++) S::store(constants + (size_t)p * rows + v * S::lanes, S::broadcast(value));
      });
      transform_feature(t, i, constants);
    }
  }

  Matrix<T> matrix(const OperationLayout& layout) const { return {chain.weight(layout), layout.inputs, 1}; }

  // Starts the sums of the units of steps [begin, end) with all inputs of earlier steps.
  void start_sums(const Transform& t, int begin, int end) {
    for (int j = 0; j < t.num_operations; j++) {
      const Operation& o = t.operations[j];
      if (o.kind != OperationKind::linear) continue;
      const OperationLayout& layout = chain.of(index, j);
      const int first = chain.ready(t, j + 1, begin - 1), last = chain.ready(t, j + 1, end - 1);
      const T* bias = chain.bias(layout) + first;
      const Range inputs{chain.first_input(t, o), chain.ready(t, o.source, begin - 1)};
      multiply<T, vectors>(matrix(layout), first, last, [&](int, int) { return inputs; }, units_of(o.source),
                           at(layout.sums), [&](int unit, int) { return S::broadcast(bias[unit]); },
                           [](int, Vector sum) { return sum; });
    }
  }

  // Computes the units of all values in steps [step, end). If `begin` is not 0, sums start from those of `start_sums`.
  void compute_units(const Transform& t, int step, int end, int begin) {
    for (int j = 0; j < t.num_operations; j++) {
      const Operation& o = t.operations[j];
      const OperationLayout& layout = chain.of(index, j);
      const int first = chain.ready(t, j + 1, step - 1), last = chain.ready(t, j + 1, end - 1);
      if (first == last) continue;
      const auto new_units = [&](int value) {
        return units_of(value) + (has_all_units(t, value) ? (size_t)first * rows : 0);
      };
      T* out = new_units(j + 1);
      T* slopes = activations && layout.has_slopes ? activations + (layout.slopes + first) * rows : nullptr;
      const size_t size = (size_t)(last - first) * rows;
      switch (o.kind) {
        case OperationKind::linear:
          linear(t, j, first, last, begin, out);
          if (!is_activated_later(o)) continue;
          activate(o, out, out, slopes, size);
          break;
        case OperationKind::activation:
          activate(o, new_units(o.source), out, slopes, size);
          break;
        case OperationKind::sum: {
          const T *in = new_units(o.source), *other = new_units(o.other);
          for (size_t i = 0; i < size; i += S::lanes) S::store(out + i, S::load(other + i) + S::load(in + i));
          break;
        }
        case OperationKind::guidance: {  // value + w (value - other), with a w for each unit
          const T *weights = chain.bias(layout) + first, *in = new_units(o.source), *other = new_units(o.other);
          for (size_t i = 0; i < size; i += S::lanes) {
            const Vector a = S::load(in + i), b = S::load(other + i);
            S::store(out + i, a + (a - b) * weights[i / rows]);
          }
          break;
        }
        default: use_context(o, layout, first, last, new_units(o.source), out, slopes);
      }
      if (o.is_kept)
        for (size_t i = 0; i < size; i += rows) check_finite(out + i);
    }
  }

  // Returns false if `linear` applies the activation to its sums.
  static bool is_activated_later(const Operation& o) {
    return o.activation != Activation::identity && o.activation != Activation::relu;
  }

  // Computes the sums of a layer, and their ReLU if it has one.
  void linear(const Transform& t, int j, int first, int last, int begin, T* out) {
    const Operation& o = t.operations[j];
    const OperationLayout& layout = chain.of(index, j);
    const T *bias = chain.bias(layout) + first, *sums = begin ? at(layout.sums) : nullptr;
    const int from = begin ? chain.ready(t, o.source, begin - 1) : chain.first_input(t, o);
    const size_t skipped = begin ? first - chain.ready(t, j + 1, begin - 1) : 0;
    multiply<T, vectors>(
        matrix(layout), first, last, [&](int, int unit) { return Range{from, chain.reads(layout, unit)}; },
        units_of(o.source), out,
        [&](int unit, int v) {
          return sums ? S::load(sums + (skipped + unit) * rows + v * S::lanes) : S::broadcast(bias[unit]);
        },
        [&](int v, Vector sum) {
          if (is_activated_later(o)) return sum;
          if (o.activation == Activation::relu) sum = S::max(sum, 0);
          if (o.is_kept) non_finite[v] += sum * T(0);
          return sum;
        });
  }

  // Adds activation(layer(context)) to a value, or multiplies the value by it. Writes the derivatives of the activation to
  // `slopes`, or its values if these give the derivatives.
  void use_context(const Operation& o, const OperationLayout& layout, int first, int last, const T* in, T* out, T* slopes) {
    const T* bias = chain.bias(layout) + first;
    const Range inputs{0, chain.shares_context ? 0 : layout.inputs};
    multiply<T, vectors>(matrix(layout), first, last, [&](int, int) { return inputs; }, context, out,
                         [&](int unit, int) { return S::broadcast(bias[unit]); }, [](int, Vector sum) { return sum; });
    const size_t size = (size_t)(last - first) * rows;
    const bool keeps_values = slopes && !needs_slopes(o.activation);
    activate(o, out, out, keeps_values ? nullptr : slopes, size);
    for (size_t i = 0; i < size; i += S::lanes) {
      const Vector value = S::load(in + i), change = S::load(out + i);
      if (keeps_values) S::store(slopes + i, change);
      S::store(out + i, o.kind == OperationKind::gate_context ? value * change : value + change);
    }
  }

  // Keeps the i-th feature in the order of the steps as it is.
  void keep_feature(const Transform& t, int i) {
    const size_t feature = (size_t)t.order[i] * rows;
    if (inverts) copy_units(features + feature, 1, rows, units_of(0) + (size_t)(t.context + i) * rows);
    for (int v = 0; v < vectors && call.is_by_feature; v++) S::store(copy + feature + v * S::lanes, Vector{});
  }

  // Transforms the i-th feature in the order of the steps.
  void transform_feature(const Transform& t, int i, const T* parameters) {
    const size_t feature = (size_t)t.order[i] * rows;
    with_feature_transform<T>(t, inverts, feature_memory, [&](const auto& make) {
      for (int v = 0; v < vectors; v++) {
        T* at = features + feature + v * S::lanes;
        Vector change{};
        const Vector in = S::load(at);
        auto transform = make({parameters + v * S::lanes, rows});
        const Vector out = transform.apply(in, call.log_det, change, non_finite[v]);
        S::store(at, out);
        if (inverts) change = -change;
        add(v, change);
        if (call.is_by_feature) S::store(copy + feature + v * S::lanes, change);
        if (inverts) {
          S::store(units_of(0) + (size_t)(t.context + i) * rows + v * S::lanes, out);
          non_finite[v] += out * T(0);
        }
      }
    });
  }
};

}  // namespace jacobiflow
