#include "recurrence.h"

namespace jacobiflow {

template void solve_recurrence<double>(const RecurrenceArgs<double>&);

}  // namespace jacobiflow
