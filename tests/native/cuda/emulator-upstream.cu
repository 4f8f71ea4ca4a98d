// The tiles of upstream's mma.cuh, unchanged, which implement the fragment layouts independently, against plain loops in
// float64.

#include "../check.h"
#include "ggml-cuda-standin.cuh"
#include "mma.cuh"

#include <cstdio>
#include <random>

using namespace cuda_emulator;
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

template <class T, class Pair, bool LDMATRIX> void check_tiles() {
    std::mt19937                       random(9);
    std::uniform_int_distribution<int> number(-60, 60);
    std::vector<T>                     a(16 * 16), b(8 * 16);
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
            for (int k = 0; k < 16; k++) {
                sum += double(float(a[row * 16 + k])) * double(float(b[column * 16 + k]));
            }
            CHECK(got[row * 8 + column] == float(sum));
        }
    }
}

int main() {
    in_all_orders([](const char *) {
        check_tiles<half, half2, false>();
        check_tiles<half, half2, true>();
        check_tiles<nv_bfloat16, nv_bfloat162, false>();
        check_tiles<nv_bfloat16, nv_bfloat162, true>();
    });
    printf("all as it should be\n");
}
