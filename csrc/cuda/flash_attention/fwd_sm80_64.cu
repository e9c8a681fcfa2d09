#include "fwd_sm80.cuh"

PYKERNELS_DEFINE_FWD_SM80(64)
