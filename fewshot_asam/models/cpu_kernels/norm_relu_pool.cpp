// What follows a convolution in a block: batch norm, ReLU and 2x2 max-pooling, in one pass each way.
//
// Arrays are channels-last: y, h [n, H, W, C]; p, out, g, code [n, H/2, W/2, C]; sums and statistics are doubles [C].
// With x = (y - mean) * rstd the normalised input, s = gamma * rstd and N = n*H*W, the block and its gradients are
//
//     out  = relu(gamma * x + beta), pooled
//     gy   = s * (G - A/N - x * B/N),   A = sum G (beta's gradient),   B = sum G*x (gamma's)
//
// where G is g scattered to the places that `code` names: 0..3 in a window, INACTIVE where the ReLU is off.
// `double_backward` is the derivative of (gy, A, B) with respect to (g, gamma, y).
//
// Sums are made in a fixed order for a given number of threads, so that a run can be repeated bit for bit.
#include "parallel_reduce.h"

namespace {

template <typename real>
void forward(const Shape &s, double eps, const real *y, const real *gamma, const real *beta, real *p, real *out,
             Code *code, double *mean, double *rstd) {
    const int C = int(s.channels);
    std::vector<real> signs(C), pivots(y, y + C);
    for (int c = 0; c < C; c++) signs[c] = gamma[c] < 0 ? -1 : 1;
    const real *sign = signs.data(), *pivot = pivots.data();
    const auto pass = [=, &s](const Band &band, real *part) {
        real *__restrict first = part, *__restrict second = part + C;
        for_windows(s, band, [=](auto at, auto below, auto to) {
            const real *__restrict y0 = y + at, *__restrict y1 = y0 + C, *__restrict y2 = y + below, *__restrict y3 = y2 + C;
            real *__restrict best = p + to;
            Code *__restrict place = code + to;
            EACH_CHANNEL {
                const real d0 = y0[c] - pivot[c], d1 = y1[c] - pivot[c], d2 = y2[c] - pivot[c], d3 = y3[c] - pivot[c];
                first[c] += (d0 + d1) + (d2 + d3);
                second[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
                const real v0 = sign[c] * y0[c], v1 = sign[c] * y1[c], v2 = sign[c] * y2[c], v3 = sign[c] * y3[c];
                const real upper = v1 > v0 ? v1 : v0, lower = v3 > v2 ? v3 : v2;
                const int upper_place = v1 > v0 ? 1 : 0, lower_place = v3 > v2 ? 3 : 2;
                best[c] = sign[c] * (lower > upper ? lower : upper);
                place[c] = Code(lower > upper ? lower_place : upper_place);
            }
        });
        for_uncovered(s, band, [=](auto at) {
            const real *__restrict value = y + at;
            EACH_CHANNEL {
                const real d = value[c] - pivot[c];
                first[c] += d;
                second[c] += d * d;
            }
        });
    };
    const Sums sums = near_mean(s, pivots, [&] { return for_bands<2, real>(s, pass); });
    normalise(s, eps, sums, pivot, gamma, beta, p, out, code, mean, rstd);
}

// dense = constant + slope * y + scale * G [+ weight * h], with a number a channel for each
template <typename real>
struct Expansion {
    std::vector<real> constant, slope, scale, weight;
    explicit Expansion(std::int64_t C) : constant(C), slope(C), scale(C), weight(C) {}
};

template <bool WITH_H, typename real>
void expand(const Shape &s, const Expansion<real> &e, const real *y, const real *h, const real *g, const Code *code,
            real *dense) {
    const int C = int(s.channels);
    const real *k = e.constant.data(), *l = e.slope.data(), *v = e.scale.data(), *u = e.weight.data();
    for_bands<0, real>(s, [=, &s](const Band &band, real *) {
        const auto row = [=](auto at, auto to, int left) {
            const real *__restrict y0 = y + at, *__restrict y1 = y0 + C, *__restrict gs = g + to;
            const real *__restrict h0 = WITH_H ? h + at : y0, *__restrict h1 = h0 + C;
            const Code *__restrict place = code + to;
            real *__restrict d0 = dense + at, *__restrict d1 = d0 + C;
            EACH_CHANNEL {
                const real spike = v[c] * gs[c];
                const int chosen = place[c];
                d0[c] = k[c] + l[c] * y0[c] + (WITH_H ? u[c] * h0[c] : 0) + (chosen == left ? spike : 0);
                d1[c] = k[c] + l[c] * y1[c] + (WITH_H ? u[c] * h1[c] : 0) + (chosen == left + 1 ? spike : 0);
            }
        };
        for_windows(s, band, [=](auto at, auto below, auto to) {
            row(at, to, 0);
            row(below, to, 2);
        });
        for_uncovered(s, band, [=](auto at) {
            EACH_CHANNEL dense[at + c] = k[c] + l[c] * y[at + c] + (WITH_H ? u[c] * h[at + c] : 0);
        });
    });
}

template <typename real>
void backward(const Shape &s, const real *g, const Code *code, const real *p, const real *y, const real *gamma,
              const double *mean, const double *rstd, real *gy, double *ab) {
    const int C = int(s.channels);
    const std::vector<real> centres(mean, mean + C);
    const real *centre = centres.data();
    const Sums sums = for_bands<2, real>(s, [=, &s](const Band &band, real *part) {
        real *__restrict first = part, *__restrict second = part + C;
        for_windows(s, band, [=](auto, auto, auto to) {
            const real *__restrict gs = g + to, *__restrict best = p + to;
            const Code *__restrict place = code + to;
            EACH_CHANNEL {
                const real active = place[c] == INACTIVE ? 0 : gs[c];
                first[c] += active;
                second[c] += active * (best[c] - centre[c]);
            }
        });
    });
    Expansion<real> e(C);
    for (int c = 0; c < C; c++) {
        const double A = ab[c] = sums[c], B = ab[C + c] = sums[C + c] * rstd[c];
        const double scale = gamma[c] * rstd[c], slope = -scale * rstd[c] * B / s.count();
        e.scale[c] = real(scale);
        e.slope[c] = real(slope);
        e.constant[c] = real(-scale * A / s.count() - slope * mean[c]);
    }
    expand<false>(s, e, y, y, g, code, gy);
}

template <typename real>
void double_backward(const Shape &s, const real *h, const real *hgamma, const real *hbeta, const real *g,
                     const Code *code, const real *p, const real *y, const real *gamma, const double *mean,
                     const double *rstd, const double *ab, real *gg, real *ggamma, real *gy) {
    const int C = int(s.channels);
    const std::vector<real> centres(mean, mean + C);
    const real *centre = centres.data();
    const Sums sums = for_bands<3, real>(s, [=, &s](const Band &band, real *part) {
        real *__restrict sum_h = part, *__restrict sum_hx = part + C, *__restrict sum_hg = part + 2 * C;
        for_windows(s, band, [=](auto at, auto below, auto to) {
            const real *__restrict h0 = h + at, *__restrict h1 = h0 + C, *__restrict h2 = h + below, *__restrict h3 = h2 + C;
            const real *__restrict y0 = y + at, *__restrict y1 = y0 + C, *__restrict y2 = y + below, *__restrict y3 = y2 + C;
            const real *__restrict gs = g + to;
            const Code *__restrict place = code + to;
            real *__restrict gathered = gg + to;
            EACH_CHANNEL {
                const real m = centre[c], a = h0[c], b = h1[c], d = h2[c], e = h3[c];
                const int chosen = place[c];
                sum_h[c] += (a + b) + (d + e);
                sum_hx[c] += (a * (y0[c] - m) + b * (y1[c] - m)) + (d * (y2[c] - m) + e * (y3[c] - m));
                const real upper = chosen == 0 ? a : b, lower = chosen == 2 ? d : e;
                const real value = chosen == INACTIVE ? 0 : chosen < 2 ? upper : lower;
                gathered[c] = value;
                sum_hg[c] += value * gs[c];
            }
        });
        for_uncovered(s, band, [=](auto at) {
            EACH_CHANNEL {
                sum_h[c] += h[at + c];
                sum_hx[c] += h[at + c] * (y[at + c] - centre[c]);
            }
        });
    });
    Expansion<real> e(C);
    std::vector<real> from_h(C), from_one(C);
    for (int c = 0; c < C; c++) {
        const SecondOrder d(gamma[c], rstd[c], mean[c], s.count(), ab[c], ab[C + c], sums[c], sums[C + c] * rstd[c],
                            sums[2 * C + c], hgamma[c], hbeta[c]);
        ggamma[c] = real(d.ggamma);
        e.constant[c] = real(d.constant);
        e.slope[c] = real(d.along_y);
        e.weight[c] = real(d.along_h);
        e.scale[c] = real(d.along_g);
        from_h[c] = real(d.from_h);
        from_one[c] = real(d.from_one);
    }
    const real *fh = from_h.data(), *f1 = from_one.data(), *fx = e.scale.data();
    for_bands<0, real>(s, [=, &s](const Band &band, real *) {
        for_windows(s, band, [=](auto, auto, auto to) {
            const real *__restrict best = p + to;
            const Code *__restrict place = code + to;
            real *__restrict result = gg + to;
            EACH_CHANNEL {
                const real v = fh[c] * result[c] + f1[c] + fx[c] * (best[c] - centre[c]);
                result[c] = place[c] == INACTIVE ? 0 : v;
            }
        });
    });
    expand<true>(s, e, y, h, g, code, gy);
}

}  // namespace

#define EXPORT(real)                                                                                                  \
    extern "C" void tail_forward_##real(const Shape *s, double eps, const real *y, const real *gamma,                 \
                                        const real *beta, real *p, real *out, Code *code, double *mean,               \
                                        double *rstd) {                                                               \
        forward(*s, eps, y, gamma, beta, p, out, code, mean, rstd);                                                   \
    }                                                                                                                 \
    extern "C" void tail_backward_##real(const Shape *s, const real *g, const Code *code, const real *p,              \
                                         const real *y, const real *gamma, const double *mean, const double *rstd,    \
                                         real *gy, double *ab) {                                                      \
        backward(*s, g, code, p, y, gamma, mean, rstd, gy, ab);                                                       \
    }                                                                                                                 \
    extern "C" void tail_double_backward_##real(                                                                      \
        const Shape *s, const real *h, const real *hgamma, const real *hbeta, const real *g, const Code *code,        \
        const real *p, const real *y, const real *gamma, const double *mean, const double *rstd, const double *ab,    \
        real *gg, real *ggamma, real *gy) {                                                                           \
        double_backward(*s, h, hgamma, hbeta, g, code, p, y, gamma, mean, rstd, ab, gg, ggamma, gy);                  \
    }
EXPORT(float)
EXPORT(double)
