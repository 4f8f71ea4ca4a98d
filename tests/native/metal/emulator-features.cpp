// Runs the kernels of emulator-features.metal in all orders and compares with plain loops.

#include "metal-harness.h"

#include <cmath>

namespace {

void expect(bool right, const char * what, size_t at = 0) {
    if (!right) {
        throw std::runtime_error(std::string(what) + ", element " + std::to_string(at));
    }
}

struct alignas(16) Three {
    uint32_t x, y, z;
};

struct Positions {
    Three    in_grid, group, groups, in_group, threads;
    uint32_t index, simdgroup, lane, simdgroups;
};

bool same(const Three & a, uint32_t x, uint32_t y, uint32_t z) {
    return a.x == x && a.y == y && a.z == z;
}

void positions() {
    const Size grid{ 2, 3, 2 }, threads{ 5, 4, 3 };

    const Values<Positions> y(grid.count() * threads.count());
    Commands().kernel("where").with(y).dispatch(grid, threads).run();
    const std::vector<Positions> all = y.values();
    size_t                       at  = 0;
    for (uint32_t n = 0; n < grid.count(); n++) {
        const uint32_t g[3] = { n % 2, n / 2 % 3, n / 6 };
        for (uint32_t i = 0; i < threads.count(); i++, at++) {
            const uint32_t    t[3] = { i % 5, i / 5 % 4, i / 20 };
            const Positions & p    = all[at];
            expect(same(p.in_grid, g[0] * 5 + t[0], g[1] * 4 + t[1], g[2] * 3 + t[2]), "thread_position_in_grid", at);
            expect(same(p.group, g[0], g[1], g[2]) && same(p.groups, 2, 3, 2), "threadgroup_position_in_grid", at);
            expect(same(p.in_group, t[0], t[1], t[2]) && same(p.threads, 5, 4, 3), "thread_position_in_threadgroup",
                   at);
            expect(p.index == i && p.simdgroup == i / 32 && p.lane == i % 32 && p.simdgroups == 2, "indices", at);
        }
    }
}

void lanes() {
    std::vector<float> x(64);
    for (int i = 0; i < 64; i++) {
        x[i] = float(i * 37 % 64);
    }
    const Values<float> values(x), y(13 * 64);
    Commands().kernel("lanes").with(values).with(y).dispatch(Size(), { 64, 1, 1 }).run();
    const std::vector<float> all = y.values();
    for (int i = 0; i < 64; i++) {
        const int           first = i / 32 * 32, lane = i % 32;
        const float * const v   = &x[first];
        float               sum = 0, before = 0, largest = v[0], smallest = v[0];
        for (int k = 0; k < 32; k++) {
            sum += v[k];
            before += k < lane ? v[k] : 0;
            largest  = std::max(largest, v[k]);
            smallest = std::min(smallest, v[k]);
        }
        const float expected[13] = {
            sum,
            largest,
            smallest,
            before + v[lane],
            before,
            v[31 - lane],
            v[lane ^ 5],
            lane < 29 ? v[lane + 3] : NAN,
            lane < 3 ? NAN : v[lane - 3],
            v[7],
            largest > 60 ? 1.0f : 0.0f,
            largest < 60 ? 1.0f : 0.0f,
            32,
        };
        for (int row = 0; row < 13; row++) {
            const float got = all[row * 64 + i];
            expect(got == expected[row] || (std::isnan(got) && std::isnan(expected[row])), "an operation of lanes",
                   size_t(row * 64 + i));
        }
    }
}

// Small integers: exact in each type.
template <class T> void product(const char * name, T (*narrow)(float)) {
    std::vector<T>     a(64), b(64);
    std::vector<float> d(64);
    for (int i = 0; i < 64; i++) {
        a[i] = narrow(float(i * 7 % 13 - 6));
        b[i] = narrow(float(i * 11 % 17 - 8));
        d[i] = float(i);
    }
    const Values<T>     va(a), vb(b);
    const Values<float> vd(d), c(8 * 16);
    Commands            commands;
    commands.kernel(name).with(va).with(vb).with(vd).with(c).threadgroup_memory(64 * sizeof(T));
    commands.dispatch(Size(), { 32, 1, 1 }).run();
    const std::vector<float> all = c.values();
    for (int row = 0; row < 8; row++) {
        for (int column = 0; column < 8; column++) {
            float sum = d[row * 8 + column];
            for (int k = 0; k < 8; k++) {
                sum += float((k * 8 + row) * 7 % 13 - 6) * float((k * 8 + column) * 11 % 17 - 8);
            }
            expect(all[row * 16 + column] == sum, name, size_t(row * 8 + column));
            expect(all[row * 16 + 8 + column] == (row == column ? 2.0f : 0.0f), "a diagonal", size_t(row));
        }
    }
}

uint16_t bfloat_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return uint16_t(bits >> 16);
}

// 0.1 added 100 times; half has 11 bits, bfloat 8.
double summed(double step, int bits) {
    const auto rounded = [bits](double x) {
        const double unit = std::ldexp(1.0, std::ilogb(x) - bits + 1);
        return std::nearbyint(x / unit) * unit;
    };
    double sum = 0;
    for (int i = 0; i < 100; i++) {
        sum = rounded(sum + rounded(step));
    }
    return sum;
}

void narrow() {
    const Values<float> x(std::vector<float>(100, 0.1f)), y(8);
    Commands().kernel("narrow").with(x).with(y).constant(int(100)).dispatch(Size(), Size()).run();
    const std::vector<float> all = y.values();
    expect(all[0] == float(summed(0.1f, 11)), "sum in half");
    expect(all[1] == float(summed(0.1f, 8)), "sum in bfloat");
    expect(std::fabs(all[2] - 310.0f) < 0.01f, "sum of vectors");
    expect(all[3] == 3.14159274f && all[4] == 3 + 2 + 5 + 2, "functions of numbers");
    expect(all[5] == 1 + 11 && all[6] == std::tanh(0.5f) + 0.5f - 1 && all[7] == 2 + 3, "functions");
}

void swizzles() {
    const Values<float> y(12);
    Commands().kernel("swizzles").with(y).dispatch(Size(), Size()).run();
    // a: (1, 2, 3, 4), (10, 2, 30, 4), (10, 6, 30, 10), (10, 12, 60, 20), (9.5, 12, 60, 19.5); b: (3, 2, 1), (1, 2, 3)
    const std::vector<float> expected = { 9.5f, 12, 60, 19.5f, 1, 2, 3, 9.5f * 2 + 12 * 3, 6, 7, 5, 8 };
    expect(y.values() == expected, "swizzles");
}

void constants() {
    for (bool first : { true, false }) {
        const Values<float> y(1);
        Commands()
            .kernel("constants", { { 3, ConstantType::int16, -5 },
                                   { 4, ConstantType::int32, 70000 },
                                   { 5, ConstantType::boolean, first } })
            .with(y)
            .dispatch(Size(), Size())
            .run();
        expect(y.values()[0] == (first ? -5.0f : 70000.0f), "function constants");
    }
}

void atomics() {
    const Values<float> y(4);
    Commands().kernel("count").with(y).threadgroup_memory(16).dispatch(Size(), { 128, 1, 1 }).run();
    for (size_t i = 0; i < 4; i++) {
        expect(y.values()[i] == 32.0f * float(i) + 4.0f * 496 + 0.5f, "atomic counters", i);
    }
}

}  // namespace

int main() {
    const emulator::Ordering orders[] = { { Order::forwards, 1 }, { Order::backwards, 1 }, { Order::shuffled, 17 } };
    for (const emulator::Ordering & order : orders) {
        ordering = order;
        positions();
        lanes();
        product<float>("product_f32", [](float x) { return x; });
        product<_Float16>("product_f16", [](float x) { return _Float16(x); });
        product<uint16_t>("product_bf16", bfloat_of);
        narrow();
        swizzles();
        constants();
        atomics();
    }
    printf("all as it should be\n");
    return 0;
}
