#include "transformer.h"

namespace jacobiflow {

template void solve_transformer<float>(const TransformerArgs<float>&);

}  // namespace jacobiflow
