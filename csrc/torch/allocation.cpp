#include "common.h"

namespace pykernels::bindings {

bool allocates_by_dispatch = false;

}  // namespace pykernels::bindings

extern "C" __attribute__((visibility("default"))) void pykernels_allocate_by_dispatch(int on) {
  pykernels::bindings::allocates_by_dispatch = on != 0;
}
