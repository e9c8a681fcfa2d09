#include "fwd_sm90.cuh"

PYKERNELS_DEFINE_FWD_SM90(256)
