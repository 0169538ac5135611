// The transforms of winograd_tiles.h over whole tiles and blocks of them, and the memory between them.
#pragma once
#include <algorithm>

#include "parallel_reduce.h"
#include "winograd_tiles.h"

namespace {

#ifdef __AVX512F__
constexpr int BYTES = 64, ROWS = 8;
#else
constexpr int BYTES = 32, ROWS = 4;
#endif

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

// `along` on every column of the square `given(i, j)`, then on every row of what that gave.
template <int FROM, int TO, typename vec, typename Given, typename Along>
__attribute__((always_inline)) inline void both_sides(Given given, Along along, vec (&result)[TO][TO]) {
    vec between[TO][FROM];
#pragma GCC unroll 6
    for (int j = 0; j < FROM; j++) {
        vec column[FROM], found[TO];
#pragma GCC unroll 6
        for (int i = 0; i < FROM; i++) column[i] = given(i, j);
        along(column, found);
#pragma GCC unroll 6
        for (int i = 0; i < TO; i++) between[i][j] = found[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < TO; i++) along(between[i], result[i]);
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

// A block of transformed tiles [IN * IN, TILES, channels]; places are not a power of two apart, which caches take badly.
template <typename Tile, typename real>
struct Transformed {
    std::int64_t channels, apart;
    real *data;
    Transformed(Buffer which, std::int64_t C)
        : channels(C), apart(Tile::TILES * C + 64 / sizeof(real)),
          data(buffer<real>(which, Tile::IN * Tile::IN * apart)) {}
    real *at(int place, std::int64_t tile) const { return data + place * apart + tile * channels; }
};

template <typename Tile>
struct Tiles {
    std::int64_t height, width, rows, columns, count, blocks;
    explicit Tiles(const Shape &s)
        : height(s.height), width(s.width), rows((height + Tile::OUT - 1) / Tile::OUT),
          columns((width + Tile::OUT - 1) / Tile::OUT), count(s.n * rows * columns),
          blocks((count + Tile::TILES - 1) / Tile::TILES) {}
    std::int64_t in_block(std::int64_t block) const {
        return std::min<std::int64_t>(Tile::TILES, count - block * Tile::TILES);
    }
    // In products of matrices for a tile; to transform the filters takes about as long as ten of them.
    std::int64_t work() const { return ((count + ROWS - 1) / ROWS * ROWS + 10) * Tile::IN * Tile::IN; }

    // Calls `body(tile, from)` for each tile of a block, where `from[i][j]` is the address in images `x` of `channels` of
    // the place that is i rows and j columns from the tile's first, less `margin`; `outside` if there is no such place.
    template <int SIDE, typename real, typename Body>
    void each(std::int64_t block, real *x, std::int64_t channels, int margin, real *outside, Body body) const {
        const auto first = block * Tile::TILES;
        auto col = first % columns, row = first / columns % rows, image = first / columns / rows;
        for (std::int64_t tile = 0; tile < in_block(block); tile++) {
            real *from[SIDE][SIDE];
            const auto top = Tile::OUT * row - margin, left = Tile::OUT * col - margin;
            for (int i = 0; i < SIDE; i++)
                for (int j = 0; j < SIDE; j++) {
                    const bool inside = top + i >= 0 && top + i < height && left + j >= 0 && left + j < width;
                    from[i][j] = inside ? x + ((image * height + top + i) * width + left + j) * channels : outside;
                }
            body(tile, from);
            if (++col < columns) continue;
            col = 0;
            if (++row == rows) row = 0, image++;
        }
    }
};

// Calls `body(thread, first, last)` for the blocks of tiles of each thread.
template <typename Body>
void share_blocks(std::int64_t blocks, int threads, Body body) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int thread = 0; thread < threads; thread++)
        body(thread, blocks * thread / threads, blocks * (thread + 1) / threads);
}

inline int threads_for(const Shape &s, std::int64_t blocks) {
    return int(std::max<std::int64_t>(1, std::min(s.threads, blocks)));
}

// `along` both sides of each tile of a block: of the FROM places a side of `x` that begin `margin` before the tile's own.
template <int FROM, typename Tile, typename real, typename Along>
void transform(const Tiles<Tile> &tiles, std::int64_t block, const real *x, int margin, const real *zeros, Along along,
               const Transformed<Tile, real> &to) {
    using vec = typename Simd<real>::vec;
    constexpr int IN = Tile::IN;
    tiles.template each<FROM>(block, x, to.channels, margin, zeros, [&](auto tile, auto &from) {
        for (std::int64_t c = 0; c < to.channels; c += Simd<real>::LANES) {
            const auto given = [&](int i, int j) { return load<vec>(from[i][j] + c); };
            vec found[IN][IN];
            both_sides<FROM>(given, along, found);
#pragma GCC unroll 6
            for (int i = 0; i < IN; i++)
#pragma GCC unroll 6
                for (int j = 0; j < IN; j++) store(to.at(IN * i + j, tile) + c, found[i][j]);
        }
    });
}

// B' x B
template <typename Tile, typename real>
void transform_images(const Tiles<Tile> &tiles, std::int64_t block, const real *x, const real *zeros,
                      const Transformed<Tile, real> &to) {
    using vec = typename Simd<real>::vec;
    transform<Tile::IN>(tiles, block, x, 1, zeros, [](const vec *a, vec *b) { Tile::images(a, b); }, to);
}

// A gy A'
template <typename Tile, typename real>
void transform_gradients(const Tiles<Tile> &tiles, std::int64_t block, const real *gy, const real *zeros,
                         const Transformed<Tile, real> &to) {
    using vec = typename Simd<real>::vec;
    transform<Tile::OUT>(tiles, block, gy, 0, zeros, [](const vec *a, vec *b) { Tile::gradients(a, b); }, to);
}

// A' m A, at the places that the images have; what falls outside is written to `nowhere`
template <typename Tile, typename real>
void transform_back(const Tiles<Tile> &tiles, std::int64_t block, const Transformed<Tile, real> &m, real *nowhere,
                    real *y) {
    using vec = typename Simd<real>::vec;
    constexpr int IN = Tile::IN, OUT = Tile::OUT;
    tiles.template each<OUT>(block, y, m.channels, 0, nowhere, [&](auto tile, auto &to) {
        for (std::int64_t c = 0; c < m.channels; c += Simd<real>::LANES) {
            const auto given = [&](int i, int j) { return load<vec>(m.at(IN * i + j, tile) + c); };
            vec found[OUT][OUT];
            both_sides<IN>(given, [](const vec *a, vec *b) { Tile::back(a, b); }, found);
            for (int i = 0; i < OUT; i++)
                for (int j = 0; j < OUT; j++) store(to[i][j] + c, found[i][j]);
        }
    });
}

// G w G' [IN * IN, K, M], of the filters turned around if `turned`; they are `k_apart` and `m_apart` from each other.
template <typename Tile, typename real>
const real *transform_filters(const real *w, int K, int k_apart, int M, int m_apart, bool turned) {
    using vec = typename Simd<real>::vec;
    constexpr int LANES = Simd<real>::LANES, IN = Tile::IN;
    real *u = buffer<real>(FILTERS, std::int64_t(IN * IN) * K * M);
    for (int k = 0; k < K; k++)
        for (int m = 0; m < M; m += LANES) {
            real taps[9][LANES];
            for (int lane = 0; lane < LANES; lane++) {
                const real *from = w + k * k_apart + (m + lane) * m_apart;
                for (int i = 0; i < 9; i++) taps[turned ? 8 - i : i][lane] = from[i];
            }
            const auto given = [&](int i, int j) { return load<vec>(taps[3 * i + j]); };
            vec found[IN][IN];
            both_sides<3>(given, [](const vec *a, vec *b) { Tile::filters(a, b); }, found);
            for (int i = 0; i < IN; i++)
                for (int j = 0; j < IN; j++) store(u + (std::int64_t(IN * i + j) * K + k) * M + m, found[i][j]);
        }
    return u;
}

// gw [D, C, 3, 3] = G' m G for m [IN * IN, C, D]
template <typename Tile, typename real>
void to_filters(const real *m, int C, int D, real *gw) {
    using vec = typename Simd<real>::vec;
    constexpr int LANES = Simd<real>::LANES, IN = Tile::IN;
    for (int c = 0; c < C; c++)
        for (int d = 0; d < D; d += LANES) {
            const auto given = [=](int i, int j) {
                return load<vec>(m + (std::int64_t(IN * i + j) * C + c) * D + d);
            };
            vec found[3][3];
            both_sides<IN>(given, [](const vec *a, vec *b) { Tile::taps(a, b); }, found);
            real taps[9][LANES];
            for (int i = 0; i < 9; i++) store(taps[i], found[i / 3][i % 3]);
            for (int lane = 0; lane < LANES; lane++)
                for (int i = 0; i < 9; i++) gw[(std::int64_t(d + lane) * C + c) * 9 + i] = taps[i][lane];
        }
}

}  // namespace
