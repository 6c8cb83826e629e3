// The kernel of a chain of transforms. A warp is a vector, and the warps of a block share a tile of 32 rows. All arguments have
// 64 bits, as Python passes its integers.
#define JACOBIFLOW_CUDA
#include "forward.h"

using namespace jacobiflow;

extern "C" __global__ void __launch_bounds__(256, 2)
jacobiflow_chain(const Plan<float>* image, const float* packed, const float* input, int64_t in_stride, const float* context,
                 int64_t context_stride, float* out, float* log_det, uint8_t* failed, int64_t rows, float* memory) {
  using Tile = ForwardTile<float, 1>;
  Plan<float> plan = *image;
  plan.packed = packed;
  plan.call.input = input, plan.call.in_stride = in_stride;
  plan.call.context = context, plan.call.context_stride = context_stride;
  plan.call.out = out, plan.call.log_det = log_det, plan.call.failed = failed;
  const size_t units = plan.tile_units + (Lanes<float>::members() - 1) * plan.own_units();
  Tile tile(plan, memory + blockIdx.x * units * Tile::rows);
  for (int64_t first = blockIdx.x * (int64_t)Tile::rows; first < rows; first += gridDim.x * (int64_t)Tile::rows)
    tile.run(first, (int)smaller<int64_t>(Tile::rows, rows - first), nullptr);
}
