// SPDX-License-Identifier: Apache-2.0
// Four taps a pooled cell; the backward gathers the cells that touched a patch, so no two tasks add to one place.
#include <vector>

#include "cpu/vectors.h"

namespace hourllava_ext {

// The two patches that a cell reads along one axis.
struct Tap {
    int64_t low, high;
    double high_weight;
};

static std::vector<Tap> taps_of(int64_t side, int64_t grid) {
    std::vector<Tap> taps(grid);
    for (int64_t g = 0; g < grid; ++g) {
        // Centres of cells on the patch axis; those before the first centre read the first patch.
        const double centre = std::max(0.0, (g + 0.5) * side / grid - 0.5);
        const int64_t low = std::min<int64_t>(static_cast<int64_t>(centre), side - 1);
        taps[g] = {low, std::min(low + 1, side - 1), centre - low};
    }
    return taps;
}

// Four patches (width,) and their weights.
template <class T>
struct Cell {
    const T* taps[4];
    accumulate_t<T> weights[4];
};

template <class Tile, class T>
ALWAYS_INLINE void pool_cell(const Cell<T>& cell, int64_t width, T* out) {
    using L = Line<Tile, T>;
    const auto [a, b, c, d] = cell.taps;
    const auto [wa, wb, wc, wd] = cell.weights;
    int64_t i = 0;
    for (; i + L::kCount <= width; i += L::kCount) {
        const L first = L::load(a + i), second = L::load(b + i), third = L::load(c + i), fourth = L::load(d + i);
        L sum;
        for (int part = 0; part < L::kParts; ++part) {
            sum.parts[part] =
                first.parts[part] * wa + second.parts[part] * wb + third.parts[part] * wc + fourth.parts[part] * wd;
        }
        sum.store(out + i);
    }
    for (; i < width; ++i) {
        out[i] = store<T>(wa * load<T>(a[i]) + wb * load<T>(b[i]) + wc * load<T>(c[i]) + wd * load<T>(d[i]));
    }
}

template <class Tile, class T>
ALWAYS_INLINE void pool_frames(const PoolGridParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    const std::vector<Tap> taps = taps_of(p.side, p.grid);
    for (int64_t t = first; t < last; ++t) {
        const T* frame = p.patches + t * p.side * p.side * p.width;
        T* out = p.out + t * p.grid * p.grid * p.width;
        for (const Tap& y : taps) {
            const T *upper = frame + y.low * p.side * p.width, *lower = frame + y.high * p.side * p.width;
            for (const Tap& x : taps) {
                const double u = 1 - y.high_weight, l = 1 - x.high_weight;
                const Cell<T> cell{
                    {upper + x.low * p.width, upper + x.high * p.width, lower + x.low * p.width,
                     lower + x.high * p.width},
                    {A(u * l), A(u * x.high_weight), A(y.high_weight * l), A(y.high_weight * x.high_weight)}};
                pool_cell<Tile>(cell, p.width, out);
                out += p.width;
            }
        }
    }
}

// For each patch of one axis, the cells that read it.
struct Reader {
    int64_t cell;
    double weight;
};

static std::vector<std::vector<Reader>> readers_of(int64_t side, int64_t grid) {
    std::vector<std::vector<Reader>> readers(side);
    const std::vector<Tap> taps = taps_of(side, grid);
    for (int64_t g = 0; g < grid; ++g) {
        readers[taps[g].low].push_back({g, 1 - taps[g].high_weight});
        readers[taps[g].high].push_back({g, taps[g].high_weight});
    }
    return readers;
}

template <class Tile, class T>
ALWAYS_INLINE void pool_frames_backward(const PoolGridBackwardParams<T>& p, int64_t first, int64_t last) {
    using A = accumulate_t<T>;
    const std::vector<std::vector<Reader>> readers = readers_of(p.side, p.grid);
    const Scratch<A> sum(p.width);
    for (int64_t t = first; t < last; ++t) {
        const T* grad = p.grad + t * p.grid * p.grid * p.width;
        T* out = p.grad_patches + t * p.side * p.side * p.width;
        for (const auto& rows : readers) {
            for (const auto& columns : readers) {
                if (rows.empty() || columns.empty()) {
                    std::memset(static_cast<void*>(out), 0, p.width * sizeof(T));
                    out += p.width;
                    continue;
                }
                if (rows.size() == 1 && columns.size() == 1) {
                    const T* cell = grad + (rows[0].cell * p.grid + columns[0].cell) * p.width;
                    scale_row<Tile>(cell, out, p.width, A(rows[0].weight * columns[0].weight));
                    out += p.width;
                    continue;
                }
                std::fill(sum.get(), sum.get() + p.width, A{0});
                for (const Reader& y : rows) {
                    for (const Reader& x : columns) {
                        const T* cell = grad + (y.cell * p.grid + x.cell) * p.width;
                        const A weight = y.weight * x.weight;
                        for (int64_t i = 0; i < p.width; ++i) sum.get()[i] += weight * load<T>(cell[i]);
                    }
                }
                for (int64_t i = 0; i < p.width; ++i) out[i] = store<T>(sum.get()[i]);
                out += p.width;
            }
        }
    }
}

CPU_KERNEL(pool_grid_cpu, PoolGridParams, pool_frames, p.frames, 4 * p.grid * p.grid * p.width)
CPU_KERNEL(pool_grid_backward_cpu, PoolGridBackwardParams, pool_frames_backward, p.frames, p.side* p.side* p.width)

}  // namespace hourllava_ext
