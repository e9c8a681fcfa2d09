// Huge pages for memory that kernels stride through or write for the first time.
#pragma once

#include <cstddef>

namespace pykernels::cpu {

// Asks for huge pages inside [start, start + bytes). The first writes to a new output, which fault page by page, can
// take as long as the computation. A hint: nothing happens where there are none, or where the range holds less than
// two.
void want_huge_pages(void* start, size_t bytes);

}  // namespace pykernels::cpu
