// 3x3 convolutions of padding 1 and their gradients by Winograd's minimal filtering F(2x2, 3x3), as in Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016).
//
// Arrays are channels-last: x [n, H, W, C], y [n, H, W, D]; filters are w [D, C, 3, 3]. A tile of y, 2x2 places, comes
// from 4x4 places of x. With * the product place by place,
//
//     y  = A' [sum over c of (G w G') * (B' x B)] A        16 products instead of 36
//     gw = G' [sum over tiles of (B' x B) * (A gy A')] G
//
// and gx is the convolution of gy with the filters turned around. At each of the 16 places the sum is a product of
// matrices, made for TILES tiles at once, so that all in between stays in the cache.
#include "winograd_transforms.h"

namespace {

constexpr int BLOCKS_OF_A_PART = 16;

// A matrix whose rows and columns are so far apart in memory.
template <typename real>
struct Strided {
    real *data;
    std::int64_t row, column;
    Strided moved(std::int64_t rows, std::int64_t columns) const {
        return {data + rows * row + columns * column, row, column};
    }
};

// c = a b, or c += a b, for ROWS rows and V vectors of columns; K is what is summed over.
template <bool ADD, int V, typename real>
void product(const Strided<const real> &a, const Strided<const real> &b, std::int64_t K, const Strided<real> &c) {
    using vec = typename Simd<real>::vec;
    constexpr int LANES = Simd<real>::LANES;
    vec sum[ROWS][V];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sum[r][v] = ADD ? load<vec>(c.data + r * c.row + v * LANES) : vec{};
    for (std::int64_t k = 0; k < K; k++) {
        vec right[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) right[v] = load<vec>(b.data + k * b.row + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const real left = a.data[r * a.row + k * a.column];
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) sum[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) store(c.data + r * c.row + v * LANES, sum[r][v]);
}

// The same for any number of columns that fills vectors, and for all rows of ROWS that begin before `rows`.
template <bool ADD, typename real>
void multiply(const Strided<const real> &a, const Strided<const real> &b, std::int64_t rows, std::int64_t K,
              std::int64_t columns, const Strided<real> &c) {
    constexpr int LANES = Simd<real>::LANES;
    for (std::int64_t d = 0; d < columns; d += 2 * LANES)
        for (std::int64_t r = 0; r < rows; r += ROWS)
            if (d + LANES < columns)
                product<ADD, 2>(a.moved(r, 0), b.moved(0, d), K, c.moved(r, d));
            else
                product<ADD, 1>(a.moved(r, 0), b.moved(0, d), K, c.moved(r, d));
}

// y [n, H, W, D] from x [n, H, W, C] and transformed filters u [IN * IN, C, D]
template <typename Tile, typename real>
void convolve(const Shape &s, const real *x, int C, const real *u, int D, real *y) {
    const Tiles<Tile> tiles(s);
    const std::vector<real> zeros(C);
    share_blocks(tiles.blocks, threads_for(s, tiles.blocks), [&](int, auto first, auto last) {
        const Transformed<Tile, real> in(LEFT, C), out(RIGHT, D);
        std::vector<real> nowhere(D);
        for (auto block = first; block < last; block++) {
            transform_images(tiles, block, x, zeros.data(), in);
            for (int p = 0; p < Tile::IN * Tile::IN; p++)
                multiply<false, real>({in.at(p, 0), C, 1}, {u + std::int64_t(p) * C * D, D, 1}, tiles.in_block(block),
                                      C, D, {out.at(p, 0), D, 1});
            transform_back(tiles, block, out, nowhere.data(), y);
        }
    });
}

template <typename real>
void add(real *to, const real *from, std::int64_t size) {
    for (std::int64_t i = 0; i < size; i++) to[i] += from[i];
}

// (B' x B) * (A gy A') summed over tiles, [IN * IN, C, D]; in two stages, as long sums of single numbers lose digits
template <typename Tile, typename real>
const real *sum_over_tiles(const Shape &s, const real *x, int C, const real *gy, int D) {
    const Tiles<Tile> tiles(s);
    const int threads = threads_for(s, tiles.blocks);
    const std::vector<real> zeros(std::max(C, D));
    const std::int64_t size = std::int64_t(Tile::IN * Tile::IN) * C * D;
    real *totals = buffer<real>(TOTALS, threads * size);
    share_blocks(tiles.blocks, threads, [&](int thread, auto first, auto last) {
        const Transformed<Tile, real> images(LEFT, C), gradients(RIGHT, D);
        real *total = totals + thread * size, *part = buffer<real>(PART, size);
        for (auto start = first; start < last; start += BLOCKS_OF_A_PART) {
            real *sum = start == first ? total : part;
            std::fill(sum, sum + size, real(0));
            for (auto block = start; block < std::min<std::int64_t>(start + BLOCKS_OF_A_PART, last); block++) {
                transform_images(tiles, block, x, zeros.data(), images);
                transform_gradients(tiles, block, gy, zeros.data(), gradients);
                for (int p = 0; p < Tile::IN * Tile::IN; p++)
                    multiply<true, real>({images.at(p, 0), 1, C}, {gradients.at(p, 0), D, 1}, C, tiles.in_block(block),
                                         D, {sum + std::int64_t(p) * C * D, D, 1});
            }
            if (sum == part) add(total, part, size);
        }
    });
    for (int thread = 1; thread < threads; thread++) add(totals, totals + thread * size, size);
    return totals;
}

// The functions for one kind of tiles; the shape is that of y, and `inputs` are the channels of x.
template <typename Tile>
struct Convolution {
    template <typename real>
    static void forward(const Shape &s, const real *x, const real *w, real *y) {
        const int C = int(s.inputs), D = int(s.channels);
        convolve<Tile>(s, x, C, transform_filters<Tile>(w, C, 9, D, 9 * C, false), D, y);
    }
    template <typename real>
    static void input_gradient(const Shape &s, const real *gy, const real *w, real *gx) {
        const int C = int(s.inputs), D = int(s.channels);
        convolve<Tile>(s, gy, D, transform_filters<Tile>(w, D, 9 * C, C, 9, true), C, gx);
    }
    template <typename real>
    static void weight_gradient(const Shape &s, const real *x, const real *gy, real *gw) {
        const int C = int(s.inputs), D = int(s.channels);
        to_filters<Tile>(sum_over_tiles<Tile>(s, x, C, gy, D), C, D, gw);
    }
};

bool large(const Shape &s) { return Tiles<Large>(s).work() < Tiles<Small>(s).work(); }

}  // namespace

// Without such instructions PyTorch, which has its own for every processor, is several times as fast.
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
extern "C" const int winograd_is_fast = 1;
#else
extern "C" const int winograd_is_fast = 0;
#endif

#define EXPORT(function, real)                                                                                        \
    extern "C" void conv_##function##_##real(const Shape *s, const real *a, const real *b, real *result) {            \
        large(*s) ? Convolution<Large>::function(*s, a, b, result) : Convolution<Small>::function(*s, a, b, result);  \
    }
EXPORT(forward, float)
EXPORT(forward, double)
EXPORT(input_gradient, float)
EXPORT(input_gradient, double)
EXPORT(weight_gradient, float)
EXPORT(weight_gradient, double)
