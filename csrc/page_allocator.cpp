// SPDX-License-Identifier: Apache-2.0
#include "page_allocator.h"

#include <exception>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace hourllava_ext {

PageAllocator::PageAllocator(int64_t pages) : references_(pages, 0) {
    free_.reserve(pages);
    for (int64_t page = pages - 1; page >= 0; --page) free_.push_back(page);
}

int64_t PageAllocator::take(const int64_t* shared, int64_t num_shared, int64_t fresh, int64_t* out) {
    const std::lock_guard lock(mutex_);
    const int64_t total = static_cast<int64_t>(references_.size());
    for (int64_t i = 0; i < num_shared; ++i) {
        if (shared[i] < 0 || shared[i] >= total || references_[shared[i]] == 0) return -2;
    }
    if (fresh > static_cast<int64_t>(free_.size())) return -1;
    Lease lease{{}, 1, State::held, order_.end()};
    lease.pages.reserve(num_shared + fresh);
    lease.pages.assign(shared, shared + num_shared);
    for (int64_t i = 0; i < fresh; ++i) {
        out[i] = free_.back();
        free_.pop_back();
        lease.pages.push_back(out[i]);
    }
    for (const int64_t page : lease.pages) ++references_[page];
    lease.place = order_.insert(order_.end(), next_);
    leases_.emplace(next_, std::move(lease));
    return next_++;
}

bool PageAllocator::pin(int64_t lease) {
    const std::lock_guard lock(mutex_);
    const auto found = leases_.find(lease);
    if (found == leases_.end() || found->second.state != State::held) return false;
    ++found->second.pins;
    order_.splice(order_.end(), order_, found->second.place);
    return true;
}

bool PageAllocator::unpin(int64_t lease) {
    const std::lock_guard lock(mutex_);
    const auto found = leases_.find(lease);
    if (found == leases_.end() || found->second.pins == 0) return false;
    if (--found->second.pins == 0 && found->second.state == State::released) give_back(found);
    return true;
}

int64_t PageAllocator::evict(int64_t wanted, int64_t* out, int64_t capacity) {
    const std::lock_guard lock(mutex_);
    int64_t gained = static_cast<int64_t>(free_.size()), chosen = 0;
    for (auto lease = order_.begin(); gained < wanted && lease != order_.end() && chosen < capacity; ++lease) {
        const Lease& candidate = leases_.at(*lease);
        if (candidate.pins > 0) continue;
        gained += pages_to_gain(candidate);
        out[chosen++] = *lease;
    }
    if (gained < wanted) return -1;
    for (int64_t i = 0; i < chosen; ++i) leave(leases_.at(out[i]), State::evicted);
    return chosen;
}

bool PageAllocator::release(int64_t lease) {
    const std::lock_guard lock(mutex_);
    const auto found = leases_.find(lease);
    if (found == leases_.end() || found->second.state == State::released) return false;
    leave(found->second, State::released);
    if (found->second.pins == 0) give_back(found);
    return true;
}

PageCounts PageAllocator::counts() const {
    const std::lock_guard lock(mutex_);
    PageCounts counts{static_cast<int64_t>(references_.size()), static_cast<int64_t>(free_.size()), 0};
    for (const int64_t lease : order_) {
        const Lease& held = leases_.at(lease);
        if (held.pins == 0) counts.reclaimable += pages_to_gain(held);
    }
    return counts;
}

// A page that two leases share is also in one that is pinned: a lease that others have replaced lives by its pins
// alone.
int64_t PageAllocator::pages_to_gain(const Lease& lease) const {
    int64_t alone = 0;
    for (const int64_t page : lease.pages) alone += references_[page] == 1;
    return alone;
}

void PageAllocator::leave(Lease& lease, State state) {
    if (lease.state == State::held) order_.erase(lease.place);
    lease.state = state;
}

void PageAllocator::give_back(std::unordered_map<int64_t, Lease>::iterator found) {
    const std::vector<int64_t>& pages = found->second.pages;
    // Backwards, so that neighbours are neighbours again for whoever takes them next.
    for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
        if (--references_[*page] == 0) free_.push_back(*page);
    }
    leases_.erase(found);
}

}  // namespace hourllava_ext

// Plain C functions that hourllava_ext/page_allocator.py calls with ctypes, which lets other Python threads run
// meanwhile.
using hourllava_ext::PageAllocator;

EXPORT PageAllocator* hourllava_ext_pages_new(int64_t pages) {
    try {
        return new PageAllocator(pages);
    } catch (const std::exception&) {
        return nullptr;
    }
}

EXPORT void hourllava_ext_pages_delete(PageAllocator* pages) { delete pages; }

EXPORT int64_t hourllava_ext_pages_take(PageAllocator* pages, const int64_t* shared, int64_t num_shared, int64_t fresh,
                                        int64_t* out) {
    return pages->take(shared, num_shared, fresh, out);
}

EXPORT bool hourllava_ext_pages_pin(PageAllocator* pages, int64_t lease) { return pages->pin(lease); }

EXPORT bool hourllava_ext_pages_unpin(PageAllocator* pages, int64_t lease) { return pages->unpin(lease); }

EXPORT int64_t hourllava_ext_pages_evict(PageAllocator* pages, int64_t wanted, int64_t* out, int64_t capacity) {
    return pages->evict(wanted, out, capacity);
}

EXPORT bool hourllava_ext_pages_release(PageAllocator* pages, int64_t lease) { return pages->release(lease); }

EXPORT void hourllava_ext_pages_counts(const PageAllocator* pages, int64_t* out) {
    const auto counts = pages->counts();
    out[0] = counts.total;
    out[1] = counts.free;
    out[2] = counts.reclaimable;
}
