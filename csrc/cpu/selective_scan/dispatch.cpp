#include "../common/dispatch.h"

#include "../../include/pykernels/selective_scan.h"

PYKERNELS_DISPATCH_VECTORS(selective_scan_fwd, SelectiveScanParams)
PYKERNELS_DISPATCH_VECTORS(selective_scan_bwd, SelectiveScanBackwardParams)
PYKERNELS_DISPATCH_VECTORS(selective_scan_step, SelectiveScanStepParams)
