// Sizes of structures, offsets of their fields and values of enumerations, which boundary.py compares with its own.
#include "boundary.h"

#include <cstddef>

using namespace jacobiflow;

#define SIZE(type) {#type, sizeof(type)}
#define FIELD(type, name) {#type "." #name, offsetof(type, name)}
#define VALUE(type, name) {#type "." #name, (int32_t)type::name}

struct Entry {
  const char* name;
  int64_t value;
};

constexpr Entry layout[] = {
    SIZE(Operation), FIELD(Operation, kind), FIELD(Operation, source), FIELD(Operation, other),
    FIELD(Operation, units), FIELD(Operation, weight), FIELD(Operation, bias), FIELD(Operation, function),
    FIELD(Operation, is_kept), FIELD(Operation, first), FIELD(Operation, second), FIELD(Operation, mask),
    FIELD(Operation, rows), FIELD(Operation, ready),
    SIZE(Transform), FIELD(Transform, kind), FIELD(Transform, features), FIELD(Transform, steps),
    FIELD(Transform, parameters), FIELD(Transform, operation_count), FIELD(Transform, context),
    FIELD(Transform, context_start), FIELD(Transform, first_tensor), FIELD(Transform, scale_stride),
    FIELD(Transform, shift_stride), FIELD(Transform, bins), FIELD(Transform, ends), FIELD(Transform, is_soft_clipped),
    FIELD(Transform, has_tails), FIELD(Transform, is_circular), FIELD(Transform, is_reversed), FIELD(Transform, first),
    FIELD(Transform, second), FIELD(Transform, low), FIELD(Transform, high), FIELD(Transform, min_width),
    FIELD(Transform, min_height), FIELD(Transform, min_slope), FIELD(Transform, end_slope), FIELD(Transform, factor),
    FIELD(Transform, gap), FIELD(Transform, clip), FIELD(Transform, operations), FIELD(Transform, order),
    FIELD(Transform, starts), FIELD(Transform, input_rows), FIELD(Transform, input_ready),
    SIZE(ChainArgs), FIELD(ChainArgs, transforms), FIELD(ChainArgs, tensors), FIELD(ChainArgs, input),
    FIELD(ChainArgs, context), FIELD(ChainArgs, out), FIELD(ChainArgs, log_det), FIELD(ChainArgs, failed),
    FIELD(ChainArgs, packed), FIELD(ChainArgs, activations),
    FIELD(ChainArgs, rows), FIELD(ChainArgs, in_stride), FIELD(ChainArgs, context_stride), FIELD(ChainArgs, count),
    FIELD(ChainArgs, features), FIELD(ChainArgs, context_features), FIELD(ChainArgs, is_inverse),
    FIELD(ChainArgs, is_by_feature), FIELD(ChainArgs, threads),
    SIZE(GradientArgs), FIELD(GradientArgs, chain), FIELD(GradientArgs, grad_out), FIELD(GradientArgs, grad_log_det),
    FIELD(GradientArgs, grad_tensors), FIELD(GradientArgs, grad_input), FIELD(GradientArgs, grad_context),
    SIZE(Layer), FIELD(Layer, norm), FIELD(Layer, norm_bias), FIELD(Layer, qkv), FIELD(Layer, qkv_bias),
    FIELD(Layer, proj), FIELD(Layer, proj_bias), FIELD(Layer, mlp_norm), FIELD(Layer, mlp_norm_bias), FIELD(Layer, up),
    FIELD(Layer, up_bias), FIELD(Layer, down), FIELD(Layer, down_bias), FIELD(Layer, query_norm),
    FIELD(Layer, query_norm_bias), FIELD(Layer, key_norm), FIELD(Layer, key_norm_bias), FIELD(Layer, condition),
    FIELD(Layer, scale), FIELD(Layer, shift), FIELD(Layer, gate), FIELD(Layer, gated_scale), FIELD(Layer, gated_shift),
    FIELD(Layer, gated_up), FIELD(Layer, gated_down), FIELD(Layer, gated_gate),
    SIZE(RecurrenceArgs), FIELD(RecurrenceArgs, z), FIELD(RecurrenceArgs, position), FIELD(RecurrenceArgs, context),
    FIELD(RecurrenceArgs, query_scale), FIELD(RecurrenceArgs, proj_in), FIELD(RecurrenceArgs, proj_out),
    FIELD(RecurrenceArgs, out_bias), FIELD(RecurrenceArgs, weight_scale), FIELD(RecurrenceArgs, weight_shift),
    FIELD(RecurrenceArgs, prefix_keys_values), FIELD(RecurrenceArgs, prefix_hidden), FIELD(RecurrenceArgs, rotation),
    FIELD(RecurrenceArgs, final_norm), FIELD(RecurrenceArgs, layers), FIELD(RecurrenceArgs, x),
    FIELD(RecurrenceArgs, keys_values), FIELD(RecurrenceArgs, log_det), FIELD(RecurrenceArgs, samples),
    FIELD(RecurrenceArgs, networks), FIELD(RecurrenceArgs, tokens), FIELD(RecurrenceArgs, values),
    FIELD(RecurrenceArgs, channels), FIELD(RecurrenceArgs, hidden), FIELD(RecurrenceArgs, heads),
    FIELD(RecurrenceArgs, depth), FIELD(RecurrenceArgs, scales), FIELD(RecurrenceArgs, context_row),
    FIELD(RecurrenceArgs, context_token), FIELD(RecurrenceArgs, prefix), FIELD(RecurrenceArgs, by_density),
    FIELD(RecurrenceArgs, threads), FIELD(RecurrenceArgs, teams), FIELD(RecurrenceArgs, start),
    FIELD(RecurrenceArgs, stop), FIELD(RecurrenceArgs, soft_clip),
    VALUE(Kind, linear), VALUE(Kind, activation), VALUE(Kind, sum), VALUE(Kind, add_context),
    VALUE(Kind, gate_context), VALUE(Kind, extrapolation),
    VALUE(Function, identity), VALUE(Function, relu), VALUE(Function, leaky_relu), VALUE(Function, elu),
    VALUE(Function, selu), VALUE(Function, tanh), VALUE(Function, sigmoid), VALUE(Function, silu),
    VALUE(Function, gelu), VALUE(Function, gelu_tanh), VALUE(Function, softplus),
    VALUE(Elementwise, permutation), VALUE(Elementwise, affine), VALUE(Elementwise, soft_clipped_affine),
    VALUE(Elementwise, softplus_affine), VALUE(Elementwise, sigmoid_affine), VALUE(Elementwise, clamped_affine),
    VALUE(Elementwise, log_affine), VALUE(Elementwise, rational_quadratic), VALUE(Elementwise, rational_linear),
    VALUE(Elementwise, normal),
    VALUE(Ends, fixed), VALUE(Ends, free), VALUE(Ends, circular),
    {nullptr, 0},
};

// Returns all entries, and a last one without a name.
extern "C" const Entry* jacobiflow_layout() { return layout; }
