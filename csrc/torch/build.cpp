// What was built, for `python -m pykernels info`.
extern "C" __attribute__((visibility("default"))) const char* pykernels_cuda_build() { return PYKERNELS_CUDA_BUILD; }
