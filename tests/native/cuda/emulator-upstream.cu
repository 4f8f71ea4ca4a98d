// Unmodified code of upstream llama.cpp: gated_delta_net.cu as ggml-cuda runs it, and the tiles of mma.cuh, which
// implement the fragment layouts independently. Both against plain loops in float64.

#include "../check.h"
#include "gated_delta_net.cu"
#include "ggml-cuda-standin.cuh"
#include "mma.cuh"

#include <cstdio>
#include <random>

using namespace cuda_emulator;

static double nmse(const std::vector<float> & got, const std::vector<double> & wanted) {
    double error = 0, size = 0;
    for (size_t i = 0; i < wanted.size(); i++) {
        error += (got[i] - wanted[i]) * (got[i] - wanted[i]);
        size += wanted[i] * wanted[i];
    }
    return error / size;
}

// KDA's recurrence (a gate for each channel) over T tokens, from transposed states [D, D, H, S].
static void check_gated_delta_net(int D, int H, int T, int S) {
    std::mt19937                          random(5);
    std::uniform_real_distribution<float> uniform(-1, 1);
    auto                                  draw = [&](int64_t count, float offset, float scale) {
        std::vector<float> values(count);
        for (float & value : values) {
            value = offset + scale * uniform(random);
        }
        return values;
    };
    const int64_t rows = int64_t(H) * T * S;
    const auto    q = draw(D * rows, 0, 1), k = draw(D * rows, 0, 0.2f), v = draw(D * rows, 0, 1);
    const auto    g = draw(D * rows, -2, 2), beta = draw(rows, 0.5f, 0.5f), state = draw(int64_t(D) * D * H * S, 0, 1);

    std::vector<double> wanted(D * rows + state.size());
    for (int s = 0; s < S; s++) {
        for (int h = 0; h < H; h++) {
            const size_t        at = (size_t(s) * H + h) * D * D;
            std::vector<double> M(state.begin() + at, state.begin() + at + D * D);  // M[j * D + i] = S[i][j]
            for (int t = 0; t < T; t++) {
                const size_t row = (size_t(s) * T + t) * H + h;
                for (int j = 0; j < D; j++) {
                    double kv = 0, out = 0;
                    for (int i = 0; i < D; i++) {
                        M[j * D + i] *= std::exp(double(g[row * D + i]));
                        kv += M[j * D + i] * k[row * D + i];
                    }
                    const double delta = beta[row] * (v[row * D + j] - kv);
                    for (int i = 0; i < D; i++) {
                        M[j * D + i] += k[row * D + i] * delta;
                        out += M[j * D + i] * q[row * D + i];
                    }
                    wanted[row * D + j] = out / std::sqrt(double(D));
                }
            }
            std::copy(M.begin(), M.end(), wanted.begin() + D * rows + at);
        }
    }

    ggml_context *                                   ctx = ggml_init({ 1 << 20, nullptr, true });
    std::vector<std::unique_ptr<DeviceArray<float>>> arrays;
    const auto tensor = [&](const std::vector<float> & values, int64_t a, int64_t b, int64_t c, int64_t d) {
        arrays.push_back(std::make_unique<DeviceArray<float>>(values));
        ggml_tensor * t = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, a, b, c, d);
        t->data         = arrays.back()->data();
        return t;
    };
    ggml_tensor * sources[] = { tensor(q, D, H, T, S), tensor(k, D, H, T, S),    tensor(v, D, H, T, S),
                                tensor(g, D, H, T, S), tensor(beta, 1, H, T, S), tensor(state, D, D, H, S) };
    ggml_tensor * out       = tensor(std::vector<float>(wanted.size(), NAN), D * H, T * S + D * S, 1, 1);
    std::copy(std::begin(sources), std::end(sources), out->src);
    out->op_params[0] = 1;
    ggml_backend_cuda_context context(0);
    ggml_cuda_op_gated_delta_net(context, out);
    ggml_free(ctx);
    CHECK(nmse(arrays.back()->values(), wanted) < 1e-12);
}

using namespace ggml_cuda_mma;

// D = A B^T with mma.cuh's tiles: A is 16 x 8 registers, B is 8 x 8, D is 16 x 8.
template <class Pair, bool LDMATRIX> __global__ void multiply_tiles(const Pair * A, const Pair * B, float * D) {
    __shared__ __align__(16) Pair a[16 * 8], b[8 * 8];
    for (int i = int(threadIdx.x); i < 16 * 8; i += 32) {
        a[i] = A[i];
        if (i < 8 * 8) {
            b[i] = B[i];
        }
    }
    __syncwarp();
    tile<16, 8, Pair>  ta;
    tile<8, 8, Pair>   tb;
    tile<16, 8, float> td;
    if constexpr (LDMATRIX) {
        load_ldmatrix(ta, a, 8);
        load_ldmatrix(tb, b, 8);
    } else {
        load_generic(ta, a, 8);
        load_generic(tb, b, 8);
    }
    mma(td, ta, tb);
    for (int l = 0; l < td.ne; l++) {
        D[td.get_i(l) * 8 + td.get_j(l)] = td.x[l];
    }
}

// PER: elements per register.
template <class T, class Pair, int PER, bool LDMATRIX> void check_tiles() {
    std::mt19937                       random(9);
    std::uniform_int_distribution<int> number(-60, 60);
    std::vector<T>                     a(16 * 8 * PER), b(8 * 8 * PER);
    for (auto * values : { &a, &b }) {
        for (T & value : *values) {
            value = T(float(number(random)));
        }
    }
    DeviceArray<T>     A(a), B(b);
    DeviceArray<float> D(16 * 8);
    multiply_tiles<Pair, LDMATRIX>
        <<<1, 32>>>(reinterpret_cast<const Pair *>(A.data()), reinterpret_cast<const Pair *>(B.data()), D.data());
    const std::vector<float> got = D.values();
    for (int row = 0; row < 16; row++) {
        for (int column = 0; column < 8; column++) {
            double sum = 0;
            for (int k = 0; k < 8 * PER; k++) {
                sum += double(float(a[row * 8 * PER + k])) * double(float(b[column * 8 * PER + k]));
            }
            CHECK(got[row * 8 + column] == float(sum));
        }
    }
}

int main() {
    in_all_orders([](const char *) {
        check_gated_delta_net(16, 1, 5, 1);
        check_gated_delta_net(64, 2, 9, 2);
        check_gated_delta_net(128, 2, 4, 1);
        check_tiles<half, half2, 2, false>();
        check_tiles<half, half2, 2, true>();
        check_tiles<nv_bfloat16, nv_bfloat162, 2, false>();
        check_tiles<nv_bfloat16, nv_bfloat162, 2, true>();
        check_tiles<float, float, 1, true>();
    });
    printf("all as it should be\n");
}
