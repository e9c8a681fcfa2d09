#include "bwd_sm80.cuh"

PYKERNELS_DEFINE_BWD_SM80(64)
