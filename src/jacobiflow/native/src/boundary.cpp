// Sizes of structures, offsets of their fields and values of enumerations, which boundary.py compares with its own.
#include "boundary.h"

#include <cstddef>

using namespace jacobiflow;

#define SIZE(type) {#type, sizeof(type)}
#define FIELD(type, name) {#type "." #name, offsetof(type, name)}
#define SIZE_OF(type) {#type, sizeof(type<float>)}
#define FIELD_OF(type, name) {#type "." #name, offsetof(type<float>, name)}
#define VALUE(type, name) {#type "." #name, (int32_t)type::name}

static_assert(sizeof(RecurrenceArgs<float>) == sizeof(RecurrenceArgs<double>), "float and double have one layout");

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
    SIZE(Weight), FIELD(Weight, values), FIELD(Weight, scales), FIELD(Weight, format), FIELD(Weight, is_packed),
    SIZE_OF(LayerArgs), FIELD_OF(LayerArgs, norm), FIELD_OF(LayerArgs, norm_bias), FIELD_OF(LayerArgs, qkv),
    FIELD_OF(LayerArgs, qkv_bias), FIELD_OF(LayerArgs, proj), FIELD_OF(LayerArgs, proj_bias),
    FIELD_OF(LayerArgs, mlp_norm), FIELD_OF(LayerArgs, mlp_norm_bias), FIELD_OF(LayerArgs, up),
    FIELD_OF(LayerArgs, up_bias), FIELD_OF(LayerArgs, down), FIELD_OF(LayerArgs, down_bias),
    FIELD_OF(LayerArgs, query_norm), FIELD_OF(LayerArgs, query_norm_bias), FIELD_OF(LayerArgs, key_norm),
    FIELD_OF(LayerArgs, key_norm_bias), FIELD_OF(LayerArgs, condition), FIELD_OF(LayerArgs, scale),
    FIELD_OF(LayerArgs, shift), FIELD_OF(LayerArgs, gate), FIELD_OF(LayerArgs, gated_scale),
    FIELD_OF(LayerArgs, gated_shift), FIELD_OF(LayerArgs, gated_up), FIELD_OF(LayerArgs, gated_down),
    FIELD_OF(LayerArgs, gated_gate),
    SIZE_OF(RecurrenceArgs), FIELD_OF(RecurrenceArgs, z), FIELD_OF(RecurrenceArgs, position),
    FIELD_OF(RecurrenceArgs, context), FIELD_OF(RecurrenceArgs, query_scale), FIELD_OF(RecurrenceArgs, proj_in),
    FIELD_OF(RecurrenceArgs, proj_out), FIELD_OF(RecurrenceArgs, out_bias), FIELD_OF(RecurrenceArgs, weight_scale),
    FIELD_OF(RecurrenceArgs, weight_shift), FIELD_OF(RecurrenceArgs, prefix_keys_values),
    FIELD_OF(RecurrenceArgs, prefix_hidden), FIELD_OF(RecurrenceArgs, rotation), FIELD_OF(RecurrenceArgs, final_norm),
    FIELD_OF(RecurrenceArgs, layers), FIELD_OF(RecurrenceArgs, x), FIELD_OF(RecurrenceArgs, keys_values),
    FIELD_OF(RecurrenceArgs, log_det), FIELD_OF(RecurrenceArgs, samples), FIELD_OF(RecurrenceArgs, networks),
    FIELD_OF(RecurrenceArgs, tokens), FIELD_OF(RecurrenceArgs, values), FIELD_OF(RecurrenceArgs, channels),
    FIELD_OF(RecurrenceArgs, hidden), FIELD_OF(RecurrenceArgs, heads), FIELD_OF(RecurrenceArgs, depth),
    FIELD_OF(RecurrenceArgs, scales), FIELD_OF(RecurrenceArgs, context_row), FIELD_OF(RecurrenceArgs, context_token),
    FIELD_OF(RecurrenceArgs, prefix), FIELD_OF(RecurrenceArgs, by_density), FIELD_OF(RecurrenceArgs, threads),
    FIELD_OF(RecurrenceArgs, teams), FIELD_OF(RecurrenceArgs, start), FIELD_OF(RecurrenceArgs, stop),
    FIELD_OF(RecurrenceArgs, soft_clip),
    VALUE(OperationKind, linear), VALUE(OperationKind, activation), VALUE(OperationKind, sum), VALUE(OperationKind, add_context),
    VALUE(OperationKind, gate_context), VALUE(OperationKind, extrapolation),
    VALUE(Activation, identity), VALUE(Activation, relu), VALUE(Activation, leaky_relu), VALUE(Activation, elu),
    VALUE(Activation, selu), VALUE(Activation, tanh), VALUE(Activation, sigmoid), VALUE(Activation, silu),
    VALUE(Activation, gelu), VALUE(Activation, gelu_tanh), VALUE(Activation, softplus),
    VALUE(TransformKind, permutation), VALUE(TransformKind, affine), VALUE(TransformKind, soft_clipped_affine),
    VALUE(TransformKind, softplus_affine), VALUE(TransformKind, sigmoid_affine), VALUE(TransformKind, clamped_affine),
    VALUE(TransformKind, log_affine), VALUE(TransformKind, rational_quadratic), VALUE(TransformKind, rational_linear),
    VALUE(TransformKind, normal),
    VALUE(WeightFormat, float32), VALUE(WeightFormat, float64), VALUE(WeightFormat, bfloat16), VALUE(WeightFormat, float16),
    VALUE(WeightFormat, int16),
    VALUE(SplineBoundary, fixed), VALUE(SplineBoundary, free), VALUE(SplineBoundary, circular),
    {nullptr, 0},
};

// Returns all entries, and a last one without a name.
extern "C" const Entry* jacobiflow_layout() { return layout; }
