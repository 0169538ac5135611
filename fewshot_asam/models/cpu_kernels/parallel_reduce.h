// Shapes, bands of rows and sums by channel, for the functions that pass over images [n, H, W, C].
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

constexpr int INACTIVE = 4;
using Code = std::uint8_t;
using Sums = std::vector<double>;

struct Shape {
    std::int64_t n, height, width, channels, threads, inputs;
    double count() const { return double(n * height * width); }
};

// Two rows of y and the row of p above them; an image's last band takes an odd row with it.
struct Band {
    std::int64_t first, last, pooled;
};

// Calls `body(band, part)` for every band; `part` gathers K sums a channel, which are returned [K*C].
template <int K, typename real, typename Body>
Sums for_bands(const Shape &s, Body body) {
    const std::int64_t rows = s.height / 2, bands = s.n * rows, size = K * s.channels, stride = size + 64;
    Sums totals(s.threads * stride);
#pragma omp parallel for schedule(static, 1) num_threads(s.threads)
    for (std::int64_t thread = 0; thread < s.threads; thread++) {
        double *total = totals.data() + thread * stride;
        std::vector<real> part(size);
        for (auto b = bands * thread / s.threads; b < bands * (thread + 1) / s.threads; b++) {
            const auto image = b / rows, row = b % rows, top = image * s.height + 2 * row;
            body(Band{top, row == rows - 1 ? (image + 1) * s.height : top + 2, b}, part.data());
            for (int i = 0; i < size; i++) {
                total[i] += part[i];
                part[i] = 0;
            }
        }
    }
    for (std::int64_t thread = 1; thread < s.threads; thread++)
        for (int i = 0; i < size; i++) totals[i] += totals[thread * stride + i];
    totals.resize(size);
    return totals;
}

// Calls `body(at, below, to)` for each window: offsets of its upper left and lower left place, and of its pooled one.
template <typename Body>
void for_windows(const Shape &s, const Band &band, Body body) {
    const auto W = s.width, C = s.channels, w = W / 2;
    for (std::int64_t col = 0; col < w; col++) {
        const auto at = (band.first * W + 2 * col) * C;
        body(at, at + W * C, (band.pooled * w + col) * C);
    }
}

// Calls `body(at)` for the places that no window covers: those of an odd last column and an odd last row.
template <typename Body>
void for_uncovered(const Shape &s, const Band &band, Body body) {
    for (auto row = band.first; row < band.last; row++)
        for (auto col = row < band.first + 2 ? s.width / 2 * 2 : 0; col < s.width; col++)
            body((row * s.width + col) * s.channels);
}

// The sums that `pass` makes of y - pivot and of its square; about the mean instead, where a pivot is so far from it that
// the digits of the variance cancel.
template <typename real, typename Pass>
Sums near_mean(const Shape &s, std::vector<real> &pivots, Pass pass) {
    const auto C = s.channels;
    const Sums sums = pass();
    bool far = false;
    for (int c = 0; c < C; c++) {
        const double shift = sums[c] / s.count(), variance = sums[C + c] / s.count() - shift * shift;
        far = far || shift * shift > 256 * variance;
    }
    if (!far) return sums;
    for (int c = 0; c < C; c++) pivots[c] += real(sums[c] / s.count());
    return pass();
}

#define EACH_CHANNEL _Pragma("omp simd") for (int c = 0; c < C; c++)

// From sums of (y - pivot) and of its square to the statistics, and from the pooled y, p, to the block's result; where
// the ReLU is off, `code` becomes INACTIVE.
template <typename real>
void normalise(const Shape &s, double eps, const Sums &sums, const real *pivot, const real *gamma, const real *beta,
               const real *p, real *out, Code *code, double *mean, double *rstd) {
    const int C = int(s.channels);
    std::vector<real> scales(C), shifts(C);
    for (int c = 0; c < C; c++) {
        const double shift = sums[c] / s.count(), variance = sums[C + c] / s.count() - shift * shift;
        mean[c] = double(pivot[c]) + shift;
        rstd[c] = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
        scales[c] = real(gamma[c] * rstd[c]);
        shifts[c] = real(beta[c] - mean[c] * gamma[c] * rstd[c]);
    }
    const real *scale = scales.data(), *shift = shifts.data();
    for_bands<0, real>(s, [=, &s](const Band &band, real *) {
        for_windows(s, band, [=](auto, auto, auto to) {
            const real *__restrict best = p + to;
            real *__restrict result = out + to;
            Code *__restrict place = code + to;
            EACH_CHANNEL {
                const real v = best[c] * scale[c] + shift[c];
                result[c] = v < 0 ? 0 : v;
                place[c] = v <= 0 ? INACTIVE : place[c];  // not a number is active, as in PyTorch
            }
        });
    });
}

// What the derivative of a block's gradient needs of one channel, for cotangents h of gy, hbeta of A and hgamma of B,
// with H = sum h, K = sum h*x and HG = sum h*G: the cotangent of y is
//     constant + along_y * y + along_h * h + along_g * G
// and that of an active place of g is from_h * h + from_one + along_g * (p - mean).
struct SecondOrder {
    double ggamma, constant, along_y, along_h, along_g, from_h, from_one;

    // c1 * G + c2 * h is the cotangent of x, gamma * M that of rstd
    SecondOrder(double gamma, double r, double mean, double N, double A, double B, double H, double K, double HG,
                double hgamma, double hbeta) {
        const double scale = gamma * r, M = HG - (A * H + B * K) / N;
        const double c1 = hgamma - scale * K / N, c2 = -scale * B / N;
        ggamma = r * M;
        along_h = r * c2;
        along_g = r * c1;
        along_y = -r * (r * (c1 * B + c2 * K) / N + gamma * M * r * r / N);
        constant = -r * (c1 * A + c2 * H) / N - along_y * mean;
        from_h = scale;
        from_one = hbeta - scale * H / N;
    }
};
