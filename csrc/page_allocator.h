// SPDX-License-Identifier: Apache-2.0
// Which pages of a pool are whose: reference counts, a free list, and the order in which leases were last asked for.
#pragma once

#include <cstdint>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace hourllava_ext {

struct PageCounts {
    int64_t total;
    int64_t free;
    int64_t reclaimable;  // held only by leases that nobody has pinned
};

// Pages are numbers from 0 on. A lease is a set of pages that one memory lies in; leases may share pages, and a page is
// free when no lease holds it. A pinned lease is being read and keeps its pages, whatever is asked meanwhile. Every
// function may be called from any thread.
class PageAllocator {
  public:
    explicit PageAllocator(int64_t pages);

    // A new lease of `shared` pages, which others hold already, and of `fresh` free ones, written to `out`. It is
    // pinned once. Returns its number, -1 if there are not so many free pages, or -2 if nobody holds one of the shared:
    // then nothing has changed.
    int64_t take(const int64_t* shared,  // [num_shared]
                 int64_t num_shared, int64_t fresh,
                 int64_t* out);  // [fresh]

    // Counts as asking: the lease becomes the last to be evicted. False if it was evicted or released.
    bool pin(int64_t lease);

    // False if the lease is not pinned.
    bool unpin(int64_t lease);

    // Chooses leases that nobody has pinned, the least recently asked first, until giving back their pages would leave
    // at least `wanted` free. From then on they cannot be pinned; their pages stay theirs until `release`, so that what
    // is in them can be moved elsewhere. Returns how many were written to `out`, or -1 if all of them would not do:
    // then none is chosen. No more are chosen than there are leases.
    int64_t evict(int64_t wanted,
                  int64_t* out,  // [capacity]
                  int64_t capacity);

    // Gives the pages back: at once, or when the last pin is gone. It cannot be pinned again. False if it was released.
    bool release(int64_t lease);

    PageCounts counts() const;

  private:
    enum class State { held, evicted, released };

    struct Lease {
        std::vector<int64_t> pages;
        int64_t pins;
        State state;
        std::list<int64_t>::iterator place;  // in order_, while it is held
    };

    int64_t pages_to_gain(const Lease& lease) const;
    void leave(Lease& lease, State state);
    void give_back(std::unordered_map<int64_t, Lease>::iterator found);

    mutable std::mutex mutex_;
    std::vector<int32_t> references_;  // [pages]
    std::vector<int64_t> free_;        // the next one last
    std::unordered_map<int64_t, Lease> leases_;
    std::list<int64_t> order_;  // of held leases, the least recently asked first
    int64_t next_ = 0;
};

}  // namespace hourllava_ext
