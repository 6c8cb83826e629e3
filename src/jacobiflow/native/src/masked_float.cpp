#include "masked.h"

namespace jacobiflow {

template int64_t evaluate<float>(const ChainArgs&);
template void differentiate<float>(const GradientArgs&);

}  // namespace jacobiflow
