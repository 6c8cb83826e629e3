// A plan as one block of memory, for a device that does not see the memory of the host.
#pragma once

#include "chain.h"

namespace jacobiflow {

// Returns a plan and what it points to. The pointers are those of a copy of the block at the address `base`.
inline std::vector<char> make_image(const Chain<float>& chain, uint64_t base) {
  std::vector<char> bytes(sizeof(Plan<float>));
  const auto add = [&](const auto* values, size_t count) {
    const size_t start = (bytes.size() + 15) / 16 * 16, size = sizeof *values * count;
    bytes.resize(start + size);
    std::copy_n(reinterpret_cast<const char*>(values), size, bytes.data() + start);
    return reinterpret_cast<decltype(values)>(base + start);
  };
  std::vector<Transform> transforms(chain.call.transforms, chain.call.transforms + chain.call.count);
  for (Transform& t : transforms) {
    if (t.order) t.order = add(t.order, t.features);
    if (!t.num_operations) continue;
    std::vector<Operation> operations(t.operations, t.operations + t.num_operations);
    for (Operation& o : operations) o.mask = nullptr, o.rows = nullptr, o.ready = add(o.ready, t.steps);
    t.starts = add(t.starts, t.steps + 1), t.input_ready = add(t.input_ready, t.steps);
    t.input_rows = add(t.input_rows, t.context), t.operations = add(operations.data(), operations.size());
  }
  Plan<float> plan = chain;
  plan.call.transforms = add(transforms.data(), transforms.size());
  plan.layouts = add(chain.layouts.data(), chain.layouts.size());
  plan.first_layouts = add(chain.first_layouts.data(), chain.first_layouts.size());
  plan.lengths = add(chain.lengths.data(), chain.lengths.size());
  plan.inputs = add(chain.inputs.data(), chain.inputs.size());
  plan.ranges = add(chain.ranges.data(), chain.ranges.size());
  std::memcpy(bytes.data(), &plan, sizeof plan);
  return bytes;
}

}  // namespace jacobiflow
