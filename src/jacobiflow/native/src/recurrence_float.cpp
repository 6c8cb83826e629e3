#include "recurrence.h"

namespace jacobiflow {

template void solve_recurrence<float>(const RecurrenceArgs<float>&);

}  // namespace jacobiflow
