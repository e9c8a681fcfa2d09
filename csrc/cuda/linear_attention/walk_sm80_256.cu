#include "walk_sm80.cuh"

PYKERNELS_DEFINE_WALK_SM80(256)
