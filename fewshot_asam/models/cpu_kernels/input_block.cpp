// The whole first block: a 3x3 convolution of images with few channels, batch norm, ReLU and 2x2 max-pooling, whose
// result before pooling is never stored.
//
// The images are padded by a zero on each side, x [n, H + 2, W + 2, CHANNELS]; a patch P has K = 9 * CHANNELS entries in
// the order of memory, and the filters are w [K, C]. With y = P w, and otherwise as in norm_relu_pool.cpp, sums over all places are
//
//     sum P = P1,   sum y P = S w   with the second moments S = sum P P',
//
// which depend on the images alone, so the gradients need no dense pass: with Wg = sum of P g at the places of `code`,
//
//     gw  = s * (Wg - P1 A/N - (S w - mean P1) * rstd B/N)
//
// and the derivative of that needs, besides sums of products of these, only h = P v at the places of `code`.
#include "parallel_reduce.h"

namespace {

template <typename real>
struct Simd {
    static constexpr int LANES = 64 / sizeof(real);
    typedef real vec __attribute__((vector_size(64), aligned(sizeof(real)), may_alias));
};

// The four padded rows of a window, and y in its four places for two vectors of channels.
template <typename real, int CHANNELS>
struct Window {
    using vec = typename Simd<real>::vec;
    static constexpr int J = 3 * CHANNELS, LANES = Simd<real>::LANES;
    const real *row[4];

    Window(const Shape &s, const Band &band, const real *x, std::int64_t col) {
        const auto image = band.first / s.height, top = band.first % s.height;
        for (int i = 0; i < 4; i++)
            row[i] = x + ((image * (s.height + 2) + top + i) * (s.width + 2) + 2 * col) * CHANNELS;
    }

    void convolve(const real *w, std::int64_t C, vec (&a)[4][2]) const {
        for (auto &place : a) place[0] = place[1] = vec{};
        for (int dy = 0; dy < 3; dy++)
#pragma GCC unroll 9
            for (int j = 0; j < J; j++) {
                const real *from = w + (dy * J + j) * C;
                const vec w0 = *(const vec *)from, w1 = *(const vec *)(from + LANES);
                const real x0 = row[dy][j], x1 = row[dy][CHANNELS + j];
                const real x2 = row[dy + 1][j], x3 = row[dy + 1][CHANNELS + j];
                a[0][0] += w0 * x0, a[0][1] += w1 * x0;
                a[1][0] += w0 * x1, a[1][1] += w1 * x1;
                a[2][0] += w0 * x2, a[2][1] += w1 * x2;
                a[3][0] += w0 * x3, a[3][1] += w1 * x3;
            }
    }
};

template <typename real, typename Body>
void for_columns(const Shape &s, const Band &band, Body body) {
    for (std::int64_t col = 0; col < s.width / 2; col++) body(col, (band.pooled * (s.width / 2) + col) * s.channels);
}

// y at a place that no window covers, for one channel
template <int CHANNELS, typename real>
real at_place(const Shape &s, const real *x, const real *w, std::int64_t row, std::int64_t col, int c) {
    const auto image = row / s.height, top = row % s.height;
    real sum = 0;
    for (int dy = 0; dy < 3; dy++)
        for (int j = 0; j < 3 * CHANNELS; j++)
            sum += w[(dy * 3 * CHANNELS + j) * s.channels + c] *
                   x[((image * (s.height + 2) + top + dy) * (s.width + 2) + col) * CHANNELS + j];
    return sum;
}

template <int CHANNELS, typename real>
void forward(const Shape &s, double eps, const real *x, const real *w, const real *gamma, const real *beta, real *p,
             real *out, Code *code, double *mean, double *rstd) {
    using vec = typename Simd<real>::vec;
    constexpr int LANES = Simd<real>::LANES;
    const int C = int(s.channels);
    std::vector<real> signs(C), pivots(C);
    for (int c = 0; c < C; c++) {
        signs[c] = gamma[c] < 0 ? -1 : 1;
        pivots[c] = at_place<CHANNELS>(s, x, w, s.height / 2, s.width / 2, c);
    }
    const real *sign = signs.data(), *pivot = pivots.data();
    const auto pass = [=, &s](const Band &band, real *part) {
        for_columns<real>(s, band, [=, &s, &band](auto col, auto to) {
            const Window<real, CHANNELS> window(s, band, x, col);
            for (int c = 0; c < C; c += 2 * LANES) {
                vec a[4][2];
                window.convolve(w + c, C, a);
                for (int b = 0; b < 2; b++) {
                    const int at = c + b * LANES;
                    const vec base = *(const vec *)(pivot + at), up = *(const vec *)(sign + at);
                    const vec d0 = a[0][b] - base, d1 = a[1][b] - base, d2 = a[2][b] - base, d3 = a[3][b] - base;
                    *(vec *)(part + at) += (d0 + d1) + (d2 + d3);
                    *(vec *)(part + C + at) += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
                    const vec v0 = up * a[0][b], v1 = up * a[1][b], v2 = up * a[2][b], v3 = up * a[3][b];
                    const auto right = v1 > v0, lower_right = v3 > v2;
                    const vec upper = right ? v1 : v0, lower = lower_right ? v3 : v2;
                    const auto below = lower > upper;
                    *(vec *)(p + to + at) = up * (below ? lower : upper);
                    const auto place = below ? 2 - lower_right : -right;
                    for (int lane = 0; lane < LANES; lane++) code[to + at + lane] = Code(place[lane]);
                }
            }
        });
        for (auto row = band.first; row < band.last; row++)
            for (auto col = row < band.first + 2 ? s.width / 2 * 2 : 0; col < s.width; col++)
                for (int c = 0; c < C; c++) {
                    const real d = at_place<CHANNELS>(s, x, w, row, col, c) - pivot[c];
                    part[c] += d;
                    part[C + c] += d * d;
                }
    };
    const Sums sums = near_mean(s, pivots, [&] { return for_bands<2, real>(s, pass); });
    normalise(s, eps, sums, pivot, gamma, beta, p, out, code, mean, rstd);
}

// S and P1: rows of [K, PADDED], of which column K is P1.
template <int CHANNELS, typename real>
struct Moments {
    static constexpr int J = 3 * CHANNELS, K = 9 * CHANNELS, LANES = Simd<real>::LANES;
    static constexpr int PADDED = (K + LANES) / LANES * LANES, VECTORS = PADDED / LANES;
};

template <int CHANNELS, typename real>
void moments(const Shape &given, const real *x, double *found) {
    using M = Moments<CHANNELS, real>;
    using vec = typename Simd<real>::vec;
    Shape s = given;
    s.channels = M::K * M::PADDED;
    const Sums sums = for_bands<1, real>(s, [=, &s](const Band &band, real *part) {
        std::vector<real> patches(s.width * M::PADDED);
        for (auto row = band.first; row < band.last; row++) {
            const auto image = row / s.height, top = row % s.height;
            for (std::int64_t col = 0; col < s.width; col++) {
                real *patch = patches.data() + col * M::PADDED;
                for (int dy = 0; dy < 3; dy++)
                    for (int j = 0; j < M::J; j++)
                        patch[dy * M::J + j] =
                            x[((image * (s.height + 2) + top + dy) * (s.width + 2) + col) * CHANNELS + j];
                patch[M::K] = 1;
            }
            for (int dy = 0; dy < 3; dy++) {
                vec a[M::J][M::VECTORS] = {};
                for (std::int64_t col = 0; col < s.width; col++) {
                    const real *patch = patches.data() + col * M::PADDED;
#pragma GCC unroll 4
                    for (int v = 0; v < M::VECTORS; v++) {
                        const vec all = *(const vec *)(patch + v * M::LANES);
#pragma GCC unroll 9
                        for (int j = 0; j < M::J; j++) a[j][v] += patch[dy * M::J + j] * all;
                    }
                }
                for (int j = 0; j < M::J; j++)
                    for (int v = 0; v < M::VECTORS; v++)
                        *(vec *)(part + (dy * M::J + j) * M::PADDED + v * M::LANES) += a[j][v];
            }
        }
    });
    for (std::size_t i = 0; i < sums.size(); i++) found[i] = sums[i];
}

// (S w)[k, c] for all k and c
template <int CHANNELS, typename real>
Sums applied(const double *second, const real *w, int C) {
    using M = Moments<CHANNELS, real>;
    Sums result(M::K * C);
    for (int k = 0; k < M::K; k++)
        for (int l = 0; l < M::K; l++)
            for (int c = 0; c < C; c++) result[k * C + c] += second[k * M::PADDED + l] * w[l * C + c];
    return result;
}

// gw, Wg (into gathered) and into ab the gradients of beta (A) and gamma (B)
template <int CHANNELS, typename real>
void backward(const Shape &s, const real *x, const real *w, const double *second, const real *g, const Code *code,
              const real *p, const real *gamma, const double *mean, const double *rstd, real *gw, double *gathered,
              double *ab) {
    using M = Moments<CHANNELS, real>;
    using vec = typename Simd<real>::vec;
    constexpr int LANES = M::LANES, J = M::J, K = M::K;
    const int C = int(s.channels);
    const std::vector<real> centres(mean, mean + C);
    const real *centre = centres.data();
    const Sums sums = for_bands<K + 2, real>(s, [=, &s](const Band &band, real *part) {
        const auto columns = s.width / 2;
        std::vector<real> spread(columns * 4 * C);  // g at the place that `code` names, zero at the three others
        real *__restrict first = part + K * C, *__restrict second_sum = first + C;
        for (std::int64_t col = 0; col < columns; col++) {
            const auto to = (band.pooled * columns + col) * C;
            const real *__restrict gs = g + to, *__restrict best = p + to;
            const Code *__restrict place = code + to;
            real *__restrict at0 = spread.data() + col * 4 * C, *__restrict at1 = at0 + C;
            real *__restrict at2 = at1 + C, *__restrict at3 = at2 + C;
            EACH_CHANNEL {
                const int chosen = place[c];
                const real active = chosen == INACTIVE ? 0 : gs[c];
                first[c] += active;
                second_sum[c] += active * (best[c] - centre[c]);
                at0[c] = chosen == 0 ? active : 0;
                at1[c] = chosen == 1 ? active : 0;
                at2[c] = chosen == 2 ? active : 0;
                at3[c] = chosen == 3 ? active : 0;
            }
        }
        for (int c = 0; c < C; c += LANES)
            for (int dy = 0; dy < 3; dy++) {
                vec a[J] = {};
                for (std::int64_t col = 0; col < columns; col++) {
                    const Window<real, CHANNELS> window(s, band, x, col);
                    const real *upper = window.row[dy], *lower = window.row[dy + 1];
                    const real *at = spread.data() + col * 4 * C + c;
                    const vec g0 = *(const vec *)at, g1 = *(const vec *)(at + C);
                    const vec g2 = *(const vec *)(at + 2 * C), g3 = *(const vec *)(at + 3 * C);
#pragma GCC unroll 9
                    for (int j = 0; j < J; j++) {
                        a[j] += g0 * upper[j];
                        a[j] += g1 * upper[CHANNELS + j];
                        a[j] += g2 * lower[j];
                        a[j] += g3 * lower[CHANNELS + j];
                    }
                }
                for (int j = 0; j < J; j++) *(vec *)(part + (dy * J + j) * C + c) += a[j];
            }
    });
    const Sums sw = applied<CHANNELS>(second, w, C);
    const double N = s.count();
    for (int c = 0; c < C; c++) {
        const double A = ab[c] = sums[K * C + c], B = ab[C + c] = sums[(K + 1) * C + c] * rstd[c];
        for (int k = 0; k < K; k++) {
            const double one = second[k * M::PADDED + K], wg = gathered[k * C + c] = sums[k * C + c];
            const double along_x = rstd[c] * (sw[k * C + c] - mean[c] * one);
            gw[k * C + c] = real(gamma[c] * rstd[c] * (wg - one * A / N - along_x * B / N));
        }
    }
}

// For cotangents v of gw, hbeta of A and hgamma of B: those of g (into gg), gamma and w.
template <int CHANNELS, typename real>
void double_backward(const Shape &s, const real *v, const real *hgamma, const real *hbeta, const real *x, const real *w,
                     const double *second, const Code *code, const real *p, const real *gamma, const double *mean,
                     const double *rstd, const double *gathered, const double *ab, real *gg, real *ggamma, real *gw) {
    using M = Moments<CHANNELS, real>;
    using vec = typename Simd<real>::vec;
    constexpr int LANES = M::LANES, K = M::K;
    const int C = int(s.channels);
    const Sums sw = applied<CHANNELS>(second, w, C), sv = applied<CHANNELS>(second, v, C);
    std::vector<real> from_h(C), from_one(C), from_x(C), centres(mean, mean + C);
    for (int c = 0; c < C; c++) {
        double H = 0, HY = 0, HG = 0;
        for (int k = 0; k < K; k++) {
            H += double(v[k * C + c]) * second[k * M::PADDED + K];
            HY += double(v[k * C + c]) * sw[k * C + c];
            HG += double(v[k * C + c]) * gathered[k * C + c];
        }
        const SecondOrder d(gamma[c], rstd[c], mean[c], s.count(), ab[c], ab[C + c], H, rstd[c] * (HY - mean[c] * H),
                            HG, hgamma[c], hbeta[c]);
        ggamma[c] = real(d.ggamma);
        for (int k = 0; k < K; k++)
            gw[k * C + c] = real(d.along_h * sv[k * C + c] + d.constant * second[k * M::PADDED + K] +
                                 d.along_y * sw[k * C + c] + d.along_g * gathered[k * C + c]);
        from_h[c] = real(d.from_h);
        from_one[c] = real(d.from_one);
        from_x[c] = real(d.along_g);
    }
    const real *fh = from_h.data(), *f1 = from_one.data(), *fx = from_x.data(), *centre = centres.data();
    for_bands<0, real>(s, [=, &s](const Band &band, real *) {
        for_columns<real>(s, band, [=, &s, &band](auto col, auto to) {
            const Window<real, CHANNELS> window(s, band, x, col);
            for (int c = 0; c < C; c += 2 * LANES) {
                vec a[4][2];
                window.convolve(v + c, C, a);
                for (int b = 0; b < 2; b++)
                    for (int lane = 0; lane < LANES; lane++) {
                        const int at = c + b * LANES + lane, place = code[to + at];
                        const real upper = place == 0 ? a[0][b][lane] : a[1][b][lane];
                        const real lower = place == 2 ? a[2][b][lane] : a[3][b][lane];
                        const real h = place < 2 ? upper : lower;
                        const real value = fh[at] * h + f1[at] + fx[at] * (p[to + at] - centre[at]);
                        gg[to + at] = place == INACTIVE ? 0 : value;
                    }
            }
        });
    });
}

}  // namespace

#define EXPORT(CHANNELS, real)                                                                                        \
    extern "C" void first_moments_##CHANNELS##_##real(const Shape *s, const real *x, double *found) {                 \
        moments<CHANNELS>(*s, x, found);                                                                              \
    }                                                                                                                 \
    extern "C" void first_forward_##CHANNELS##_##real(const Shape *s, double eps, const real *x, const real *w,       \
                                                      const real *gamma, const real *beta, real *p, real *out,        \
                                                      Code *code, double *mean, double *rstd) {                       \
        forward<CHANNELS>(*s, eps, x, w, gamma, beta, p, out, code, mean, rstd);                                      \
    }                                                                                                                 \
    extern "C" void first_backward_##CHANNELS##_##real(                                                               \
        const Shape *s, const real *x, const real *w, const double *second, const real *g, const Code *code,          \
        const real *p, const real *gamma, const double *mean, const double *rstd, real *gw, double *gathered,         \
        double *ab) {                                                                                                 \
        backward<CHANNELS>(*s, x, w, second, g, code, p, gamma, mean, rstd, gw, gathered, ab);                        \
    }                                                                                                                 \
    extern "C" void first_double_backward_##CHANNELS##_##real(                                                        \
        const Shape *s, const real *v, const real *hgamma, const real *hbeta, const real *x, const real *w,           \
        const double *second, const Code *code, const real *p, const real *gamma, const double *mean,                 \
        const double *rstd, const double *gathered, const double *ab, real *gg, real *ggamma, real *gw) {             \
        double_backward<CHANNELS>(*s, v, hgamma, hbeta, x, w, second, code, p, gamma, mean, rstd, gathered, ab, gg,   \
                                  ggamma, gw);                                                                        \
    }
EXPORT(1, float)
EXPORT(3, float)
EXPORT(1, double)
EXPORT(3, double)
