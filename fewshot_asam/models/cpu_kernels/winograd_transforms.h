// The transforms of Winograd's F(2x2, 3x3), and the tiles and the memory that they work on: see winograd.cpp.
#pragma once
#include <algorithm>

#include "parallel_reduce.h"

namespace {

#ifdef __AVX512F__
constexpr int BYTES = 64, ROWS = 8;
#else
constexpr int BYTES = 32, ROWS = 4;
#endif
constexpr int PLACES = 16, TILES = 48;

template <typename real>
struct Simd {
    static constexpr int LANES = BYTES / sizeof(real);
    typedef real vec __attribute__((vector_size(BYTES), aligned(sizeof(real)), may_alias));
};

template <typename vec, typename real>
vec load(const real *from) {
    return *(const vec *)from;
}

template <typename vec, typename real>
void store(real *to, vec value) {
    *(vec *)to = value;
}

enum Buffer { FILTERS, LEFT, RIGHT, PART, TOTALS, BUFFERS };

// Memory of this thread, kept for the next call, which begins where a line of the cache does.
template <typename real>
real *buffer(Buffer which, std::int64_t size) {
    thread_local std::vector<real> kept[BUFFERS];
    constexpr std::uintptr_t LINE = 64;
    if (std::int64_t(kept[which].size()) < size + std::int64_t(LINE)) kept[which].resize(size + LINE);
    return reinterpret_cast<real *>((reinterpret_cast<std::uintptr_t>(kept[which].data()) + LINE - 1) / LINE * LINE);
}

// Transformed tiles [PLACES, TILES, channels]; the places are not a power of two apart, which caches take badly.
template <typename real>
struct Transformed {
    std::int64_t channels, apart;
    real *data;
    Transformed(Buffer which, std::int64_t C)
        : channels(C), apart(TILES * C + 64 / sizeof(real)), data(buffer<real>(which, PLACES * apart)) {}
    real *at(int place, std::int64_t tile) const { return data + place * apart + tile * channels; }
};

struct Tiles {
    std::int64_t height, width, rows, columns, count, blocks;
    explicit Tiles(const Shape &s)
        : height(s.height), width(s.width), rows((height + 1) / 2), columns((width + 1) / 2),
          count(s.n * rows * columns), blocks((count + TILES - 1) / TILES) {}
    std::int64_t in_block(std::int64_t block) const { return std::min<std::int64_t>(TILES, count - block * TILES); }

    // Calls `body(tile, at, row, col)` for each tile of a block: the image's place above and left in memory, and in it.
    template <typename Body>
    void each(std::int64_t block, Body body) const {
        const auto first = block * TILES;
        auto col = first % columns, row = first / columns % rows, image = first / columns / rows;
        for (std::int64_t tile = 0; tile < in_block(block); tile++) {
            body(tile, (image * height + 2 * row) * width + 2 * col, 2 * row, 2 * col);
            if (++col < columns) continue;
            col = 0;
            if (++row == rows) row = 0, image++;
        }
    }
};

// Calls `body(thread, first, last)` for the blocks of tiles of each thread.
template <typename Body>
void share_blocks(const Tiles &tiles, int threads, Body body) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++)
        body(thread, tiles.blocks * thread / threads, tiles.blocks * (thread + 1) / threads);
}

int threads_for(const Shape &s, const Tiles &tiles) {
    return int(std::max<std::int64_t>(1, std::min(s.threads, tiles.blocks)));
}

template <typename vec>
void along_inputs(vec &a, vec &b, vec &c, vec &d) {
    const vec first = a - c, second = b + c, third = c - b, fourth = b - d;
    a = first, b = second, c = third, d = fourth;
}

// B' x B
template <typename real>
void transform_images(const Tiles &tiles, std::int64_t block, const real *x, const real *zeros,
                      const Transformed<real> &to) {
    using vec = typename Simd<real>::vec;
    const auto C = to.channels;
    tiles.each(block, [&](auto tile, auto at, auto row, auto col) {
        const real *from[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
                const auto y = row + i - 1, z = col + j - 1;
                const bool inside = y >= 0 && y < tiles.height && z >= 0 && z < tiles.width;
                from[i][j] = inside ? x + (at + (i - 1) * tiles.width + j - 1) * C : zeros;
            }
        for (std::int64_t c = 0; c < C; c += Simd<real>::LANES) {
            vec d[4][4];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) d[i][j] = load<vec>(from[i][j] + c);
            for (int i = 0; i < 4; i++) along_inputs(d[i][0], d[i][1], d[i][2], d[i][3]);
            for (int j = 0; j < 4; j++) along_inputs(d[0][j], d[1][j], d[2][j], d[3][j]);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) store(to.at(4 * i + j, tile) + c, d[i][j]);
        }
    });
}

// A' m A, at the places that the images have
template <typename real>
void transform_back(const Tiles &tiles, std::int64_t block, const Transformed<real> &m, real *y) {
    using vec = typename Simd<real>::vec;
    const auto D = m.channels;
    tiles.each(block, [&](auto tile, auto at, auto row, auto col) {
        const bool below = row + 1 < tiles.height, right = col + 1 < tiles.width;
        real *to = y + at * D, *under = to + tiles.width * D;
        for (std::int64_t c = 0; c < D; c += Simd<real>::LANES) {
            vec upper[4], lower[4];
            for (int j = 0; j < 4; j++) {
                const vec m0 = load<vec>(m.at(j, tile) + c), m1 = load<vec>(m.at(4 + j, tile) + c);
                const vec m2 = load<vec>(m.at(8 + j, tile) + c), m3 = load<vec>(m.at(12 + j, tile) + c);
                upper[j] = m0 + m1 + m2;
                lower[j] = m1 - m2 - m3;
            }
            store(to + c, upper[0] + upper[1] + upper[2]);
            if (right) store(to + D + c, upper[1] - upper[2] - upper[3]);
            if (below) store(under + c, lower[0] + lower[1] + lower[2]);
            if (below && right) store(under + D + c, lower[1] - lower[2] - lower[3]);
        }
    });
}

// A gy A'
template <typename real>
void transform_gradients(const Tiles &tiles, std::int64_t block, const real *gy, const real *zeros,
                         const Transformed<real> &to) {
    using vec = typename Simd<real>::vec;
    const auto D = to.channels;
    tiles.each(block, [&](auto tile, auto at, auto row, auto col) {
        const bool below = row + 1 < tiles.height, right = col + 1 < tiles.width;
        const real *g0 = gy + at * D, *g2 = below ? g0 + tiles.width * D : zeros;
        const real *g1 = right ? g0 + D : zeros, *g3 = below && right ? g2 + D : zeros;
        for (std::int64_t c = 0; c < D; c += Simd<real>::LANES) {
            const vec a = load<vec>(g0 + c), b = load<vec>(g1 + c), d = load<vec>(g2 + c), e = load<vec>(g3 + c);
            const vec half[4][2] = {{a, b}, {a + d, b + e}, {a - d, b - e}, {-d, -e}};
            for (int i = 0; i < 4; i++) {
                store(to.at(4 * i, tile) + c, half[i][0]);
                store(to.at(4 * i + 1, tile) + c, half[i][0] + half[i][1]);
                store(to.at(4 * i + 2, tile) + c, half[i][0] - half[i][1]);
                store(to.at(4 * i + 3, tile) + c, -half[i][1]);
            }
        }
    });
}

template <typename vec>
void along_filters(vec a, vec b, vec c, vec *out) {
    const vec outer = (a + c) / 2, inner = b / 2;
    out[0] = a, out[1] = outer + inner, out[2] = outer - inner, out[3] = c;
}

// G w G' [PLACES, K, M], of the filters turned around if `turned`; they are `k_apart` and `m_apart` from each other.
template <typename real>
const real *transform_filters(const real *w, int K, int k_apart, int M, int m_apart, bool turned) {
    using vec = typename Simd<real>::vec;
    constexpr int LANES = Simd<real>::LANES;
    real *u = buffer<real>(FILTERS, std::int64_t(PLACES) * K * M);
    for (int k = 0; k < K; k++)
        for (int m = 0; m < M; m += LANES) {
            real taps[9][LANES];
            for (int lane = 0; lane < LANES; lane++) {
                const real *from = w + k * k_apart + (m + lane) * m_apart;
                for (int i = 0; i < 9; i++) taps[turned ? 8 - i : i][lane] = from[i];
            }
            vec columns[3][4], out[4];
            for (int j = 0; j < 3; j++)
                along_filters(load<vec>(taps[j]), load<vec>(taps[3 + j]), load<vec>(taps[6 + j]), columns[j]);
            for (int i = 0; i < 4; i++) {
                along_filters(columns[0][i], columns[1][i], columns[2][i], out);
                for (int j = 0; j < 4; j++) store(u + (std::int64_t(4 * i + j) * K + k) * M + m, out[j]);
            }
        }
    return u;
}

template <typename vec>
void along_places(vec a, vec b, vec c, vec d, vec *out) {
    const vec half = (b + c) / 2;
    out[0] = a + half, out[1] = (b - c) / 2, out[2] = half + d;
}

// gw [D, C, 3, 3] = G' m G for m [PLACES, C, D]
template <typename real>
void to_filters(const real *m, int C, int D, real *gw) {
    using vec = typename Simd<real>::vec;
    constexpr int LANES = Simd<real>::LANES;
    for (int c = 0; c < C; c++)
        for (int d = 0; d < D; d += LANES) {
            const auto at = [=](int place) { return load<vec>(m + (std::int64_t(place) * C + c) * D + d); };
            vec columns[4][3], out[3];
            real taps[9][LANES];
            for (int j = 0; j < 4; j++) along_places(at(j), at(4 + j), at(8 + j), at(12 + j), columns[j]);
            for (int i = 0; i < 3; i++) {
                along_places(columns[0][i], columns[1][i], columns[2][i], columns[3][i], out);
                for (int j = 0; j < 3; j++) store(taps[3 * i + j], out[j]);
            }
            for (int lane = 0; lane < LANES; lane++)
                for (int i = 0; i < 9; i++) gw[(std::int64_t(d + lane) * C + c) * 9 + i] = taps[i][lane];
        }
}

}  // namespace
