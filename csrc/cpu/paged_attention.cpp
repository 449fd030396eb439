// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention_backward.h"

namespace hourllava_ext {

#define PAGED_ATTENTION(T)                                                    \
    void paged_attention_cpu(const PagedAttentionParams<T>& p) { attend(p); } \
    void paged_attention_backward_cpu(const PagedAttentionBackwardParams<T>& b) { differentiate_attention(b); }
FOR_EACH_DTYPE(PAGED_ATTENTION)

}  // namespace hourllava_ext
