// What the evaluation of a chain reads, as plain pointers to memory of the processor that evaluates.
#pragma once

#include "boundary.h"
#include "products.h"

namespace jacobiflow {

inline bool reads_context(const Operation& o) {
  return o.kind == OperationKind::add_context || o.kind == OperationKind::gate_context;
}

// Returns whether tensors are the parameters of the features.
inline bool is_constant(const Transform& t) { return t.kind >= TransformKind::masked_affine && !t.num_operations; }

// Where the numbers of an operation lie. An affine transform without a network has one layout: its scale is a weight with one
// input for each feature, and its shift the bias. lu_linear has two: U with its diagonal before the softplus as bias, and L with
// the shift. If tensors are the parameters, each of them is a weight.
struct OperationLayout {
  int weight_index = -1, bias_index = -1;  // in ChainArgs.tensors; -1 without one
  int units = 0, inputs = 0;               // rows and columns of the weight
  size_t weight = 0;                       // offset in the packed weights: (units, inputs), sorted by step
  size_t bias = 0;                         // offset in the packed weights: (units), sorted by step
  const void* in_place = nullptr;          // the weight itself if it is not packed
  bool is_stored = false;                  // the backward pass reads its value
  bool has_slopes = false;                 // the backward pass reads the derivatives of its activation
  size_t place = 0;                        // first unit of its value in a tile's memory if it is not stored
  size_t sums = 0;                         // first unit in a tile's memory of the sums that it starts from
  size_t value = 0;                        // first unit in a tile's activations
  size_t slopes = 0;                       // first unit in a tile's activations of the derivatives
  size_t gradient = 0;                     // first unit in a transform's gradients
  size_t layer_gradient = 0;               // first unit in a transform's gradients of the layer of the context
  size_t reads = 0;                        // offset in `ranges`: for each unit, the end of the inputs that it reads
  size_t readers = 0;                      // offset in `ranges`: for each input, the first unit that reads it
  bool is_source_read_later = false;       // a later operation reads its source
  bool is_other_read_later = false;        // a later operation reads its second source
};

constexpr int block_steps = 32;  // steps of an inverse after which the sums of later units start anew

template <typename T>
struct Plan {
  explicit Plan(const ChainArgs& call) : call(call), packed(static_cast<const T*>(call.packed)) {}

  ChainArgs call;
  int32_t shares_context = 0;              // 1 if biases have the context, which all rows share
  int32_t max_bins = 0, max_constants = 0;  // most bins of a transform, and most parameters in tensors of a feature
  size_t tile_units = 0;                   // units of a tile's memory, which ends with `own_units`
  const OperationLayout* layouts = nullptr;
  const int32_t* first_layouts = nullptr;  // for each transform, and the end
  const int32_t* lengths = nullptr;        // for each transform, the number of steps that are computed together
  const int32_t* inputs = nullptr;         // for each transform, the first unit of its input in a tile's activations
  const int32_t* ranges = nullptr;
  const T* packed;                         // weights, null before they are packed

  size_t num_layouts(int transform) const { return first_layouts[transform + 1] - first_layouts[transform]; }

  const OperationLayout& of(int transform, int operation) const { return layouts[first_layouts[transform] + operation]; }

  bool is_stored(int transform, int value) const { return !value || of(transform, value - 1).is_stored; }

  // Return the first unit of a value in a tile's activations, and of its gradient in the transform's gradients.
  size_t value(int transform, int value) const { return value ? of(transform, value - 1).value : inputs[transform]; }
  size_t gradient(int transform, int value) const { return value ? of(transform, value - 1).gradient : 0; }

  // Return the end of the inputs that a unit of a layer reads, and the first unit that reads an input.
  int reads(const OperationLayout& layout, int unit) const { return ranges[layout.reads + unit]; }
  int readers(const OperationLayout& layout, int input) const { return ranges[layout.readers + input]; }

  const T* weight(const OperationLayout& layout) const {
    return layout.in_place ? static_cast<const T*>(layout.in_place) : packed + layout.weight;
  }
  const T* bias(const OperationLayout& layout) const { return packed + layout.bias; }

  // Calls use(index, parameter, its tensor, its column) for the parameters of a feature that are in tensors.
  template <typename Use>
  void each_parameter(int transform, int feature, const Use& use) const {
    for (int k = 0, p = 0; k < (int)num_layouts(transform); k++)
      for (int i = 0; i < of(transform, k).inputs; i++, p++) {
        const OperationLayout& layout = of(transform, k);
        use(p, weight(layout)[(size_t)feature * layout.inputs + i], k, i);
      }
  }

  // Returns L or U of lu_linear, for tiles of `vectors` vectors.
  template <int vectors>
  Triangle<T, vectors> triangle(int transform, bool is_lower) const {
    const OperationLayout& layout = of(transform, is_lower);
    return {{weight(layout), layout.inputs, 1}, layout.units, is_lower};
  }

  int units(const Transform& t, int value) const {
    if (value) return t.operations[value - 1].units;
    return t.num_operations ? t.context + t.features : t.kind == TransformKind::permutation ? 0 : call.features;
  }

  static const int32_t* rows(const Transform& t, int value) { return value ? t.operations[value - 1].rows : t.input_rows; }

  // Returns the number of units of a value that can be computed once the features before `step` are solved.
  static int ready(const Transform& t, int value, int step) {
    return step < 0 ? 0 : (value ? t.operations[value - 1].ready : t.input_ready)[step];
  }

  // Returns the number of units of a tile for the transform of a feature: two for each bin, and the parameters in tensors.
  size_t own_units() const { return (size_t)2 * max_bins + max_constants; }

  bool inverts(const Transform& t) const { return call.is_inverse != t.is_inverted; }

  // Returns the first input of a sum. A context that all rows share is in the bias already.
  int first_input(const Transform& t, const Operation& o) const { return shares_context && !o.source ? t.context : 0; }
};

}  // namespace jacobiflow
