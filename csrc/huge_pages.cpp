// SPDX-License-Identifier: Apache-2.0
// Large results on large memory pages: the first write to each page of fresh memory costs a fault, which for pages of
// 4 KiB takes several times as long as the write.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

#include "ops/common.h"

namespace hourllava_ext {

void use_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = uintptr_t{1} << 21;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data), first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t end = (begin + bytes) / kPage * kPage;
    // A hint: where the system does not know it, everything works as without.
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace hourllava_ext
