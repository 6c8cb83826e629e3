// A plan as one block of memory, for a device that does not see the memory of the host.
#pragma once

#include "chain.h"

namespace jacobiflow {

// Copies a plan and what it points to. The pointers are those of a copy of the block at the address `base`.
class Image {
 public:
  Image(const Chain<float>& chain, uint64_t base) : base(base) {
    Plan<float> plan = chain;
    bytes.resize(sizeof plan);
    std::vector<Transform> transforms(chain.call.transforms, chain.call.transforms + chain.call.count);
    for (Transform& t : transforms) {
      if (t.order) t.order = add(t.order, t.features);
      if (!t.num_operations) continue;
      std::vector<Operation> operations(t.operations, t.operations + t.num_operations);
      for (Operation& o : operations) o.mask = nullptr, o.rows = nullptr, o.ready = add(o.ready, t.steps);
      t.starts = add(t.starts, t.steps + 1), t.input_ready = add(t.input_ready, t.steps);
      t.input_rows = add(t.input_rows, t.context), t.operations = add(operations.data(), operations.size());
    }
    plan.call.transforms = add(transforms.data(), transforms.size());
    plan.layouts = add(chain.layouts.data(), chain.layouts.size());
    plan.first_layouts = add(chain.first_layouts.data(), chain.first_layouts.size());
    plan.lengths = add(chain.lengths.data(), chain.lengths.size());
    plan.inputs = add(chain.inputs.data(), chain.inputs.size());
    plan.ranges = add(chain.ranges.data(), chain.ranges.size());
    std::memcpy(bytes.data(), &plan, sizeof plan);
  }

  std::vector<char> bytes;

 private:
  const uint64_t base;

  template <typename V>
  const V* add(const V* values, size_t count) {
    const size_t start = (bytes.size() + 15) / 16 * 16;
    bytes.resize(start + sizeof(V) * count);
    std::copy_n(reinterpret_cast<const char*>(values), sizeof(V) * count, bytes.data() + start);
    return reinterpret_cast<const V*>(base + start);
  }
};

}  // namespace jacobiflow
