// SPDX-License-Identifier: Apache-2.0
// Threads take, share, read, evict and release leases; no page is ever two strangers'. Built by test_page_allocator.py.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "page_allocator.h"

namespace {

constexpr int64_t kPages = 64;
constexpr int kThreads = 8, kRounds = 3000;

void require(bool fact, const char* what) {
    if (fact) return;
    std::fprintf(stderr, "not so: %s\n", what);
    std::exit(1);
}

void work(hourllava_ext::PageAllocator& pages, std::vector<std::atomic<int>>& owners, int self) {
    std::mt19937 random(self);
    int64_t out[kPages], victims[kPages];
    for (int round = 0; round < kRounds; ++round) {
        const int64_t wanted = 1 + random() % 12;
        const int64_t evicted = pages.evict(wanted, victims, kPages);
        for (int64_t i = 0; i < evicted; ++i) {
            require(!pages.pin(victims[i]), "what is evicted cannot be pinned");
            require(pages.release(victims[i]), "what is evicted is released once");
        }
        const int64_t lease = pages.take(nullptr, 0, wanted, out);
        if (lease < 0) continue;
        for (int64_t i = 0; i < wanted; ++i) require(owners[out[i]].exchange(self) == 0, "a free page has no owner");
        // A longer memory takes the place of this one, which is still being read: all pages but the first are shared.
        int64_t more;
        const int64_t longer = pages.take(out + 1, wanted - 1, 1, &more);
        if (longer >= 0) {
            require(owners[more].exchange(self) == 0, "a free page has no owner");
            require(pages.release(lease) && !pages.pin(lease), "a released lease is read on, but not anew");
        }
        std::this_thread::yield();
        for (int64_t i = 0; i < wanted; ++i)
            require(owners[out[i]].exchange(0) == self, "a pinned page stays one's own");
        if (longer >= 0) require(owners[more].exchange(0) == self, "a pinned page stays one's own");
        require(pages.unpin(lease), "a pin can be undone");
        if (longer >= 0) require(pages.unpin(longer), "a pin can be undone");
    }
}

}  // namespace

int main() {
    hourllava_ext::PageAllocator pages(kPages);
    std::vector<std::atomic<int>> owners(kPages);
    std::vector<std::thread> threads;
    for (int i = 1; i <= kThreads; ++i) threads.emplace_back([&, i] { work(pages, owners, i); });
    for (std::thread& thread : threads) thread.join();
    int64_t victims[kPages];
    const int64_t evicted = pages.evict(kPages, victims, kPages);
    require(evicted >= 0, "when nobody reads, everything can be freed");
    for (int64_t i = 0; i < evicted; ++i) pages.release(victims[i]);
    require(pages.counts().free == kPages, "and is free then");
}
