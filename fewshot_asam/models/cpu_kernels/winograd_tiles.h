// Winograd's minimal filtering F(OUT x OUT, 3x3) along one side of a tile: the only place that knows its numbers. A
// filter of 3 taps over IN = OUT + 2 places gives OUT results,
//
//     y = A' [(G w) * (B' x)],   and gw = G' [(B' x) * (A gy)].
//
// The points are 0, 1, -1 and infinity, and 2 and -2 besides for the larger tiles.
#pragma once

namespace {

struct Small {
    static constexpr int OUT = 2, IN = 4, TILES = 48;

    template <typename vec>
    static void images(const vec *x, vec *out) {
        out[0] = x[0] - x[2], out[1] = x[1] + x[2], out[2] = x[2] - x[1], out[3] = x[1] - x[3];
    }
    template <typename vec>
    static void filters(const vec *w, vec *out) {
        const vec outer = (w[0] + w[2]) / 2, inner = w[1] / 2;
        out[0] = w[0], out[1] = outer + inner, out[2] = outer - inner, out[3] = w[2];
    }
    template <typename vec>
    static void back(const vec *m, vec *y) {
        y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
    }
    template <typename vec>
    static void gradients(const vec *g, vec *out) {
        out[0] = g[0], out[1] = g[0] + g[1], out[2] = g[0] - g[1], out[3] = -g[1];
    }
    template <typename vec>
    static void taps(const vec *m, vec *w) {
        const vec half = (m[1] + m[2]) / 2;
        w[0] = m[0] + half, w[1] = (m[1] - m[2]) / 2, w[2] = half + m[3];
    }
};

struct Large {
    static constexpr int OUT = 4, IN = 6, TILES = 24;

    template <typename vec>
    static void images(const vec *x, vec *out) {
        const vec a = x[4] - x[2] * 4, b = x[3] - x[1] * 4, c = x[4] - x[2], d = (x[3] - x[1]) * 2;
        out[0] = x[0] * 4 - x[2] * 5 + x[4], out[5] = x[1] * 4 - x[3] * 5 + x[5];
        out[1] = a + b, out[2] = a - b, out[3] = c + d, out[4] = c - d;
    }
    template <typename vec>
    static void filters(const vec *w, vec *out) {
        const vec a = (w[0] + w[2]) / 6, b = w[1] / 6, c = w[0] / 24 + w[2] / 6, d = w[1] / 12;
        out[0] = w[0] / 4, out[1] = -a - b, out[2] = b - a, out[3] = c + d, out[4] = c - d, out[5] = w[2];
    }
    template <typename vec>
    static void back(const vec *m, vec *y) {
        const vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
        y[0] = m[0] + a + c, y[1] = b + d * 2, y[2] = a + c * 4, y[3] = b + d * 8 + m[5];
    }
    template <typename vec>
    static void gradients(const vec *g, vec *out) {
        const vec a = g[0] + g[2], b = g[1] + g[3], c = g[0] + g[2] * 4, d = g[1] * 2 + g[3] * 8;
        out[0] = g[0], out[1] = a + b, out[2] = a - b, out[3] = c + d, out[4] = c - d, out[5] = g[3];
    }
    template <typename vec>
    static void taps(const vec *m, vec *w) {
        const vec a = (m[1] + m[2]) / 6, b = (m[2] - m[1]) / 6, c = m[3] + m[4], d = (m[3] - m[4]) / 12;
        w[0] = m[0] / 4 - a + c / 24, w[1] = b + d, w[2] = c / 6 - a + m[5];
    }
};

}  // namespace
