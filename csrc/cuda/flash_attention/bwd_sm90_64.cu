#include "bwd_sm90.cuh"

PYKERNELS_DEFINE_BWD_SM90(64)
