// What kernels compute: positions, operations of simdgroups, matrices, narrow types, memory.

#include <metal_stdlib>

using namespace metal;

struct positions {
    uint3 in_grid, group, groups, in_group, threads;
    uint  index, simdgroup, lane, simdgroups;
};

kernel void where(device positions * y,
                  uint3              in_grid [[thread_position_in_grid]],
                  uint3              group [[threadgroup_position_in_grid]],
                  uint3              groups [[threadgroups_per_grid]],
                  uint3              in_group [[thread_position_in_threadgroup]],
                  uint3              threads [[threads_per_threadgroup]],
                  uint               index [[thread_index_in_threadgroup]],
                  ushort             simdgroup [[simdgroup_index_in_threadgroup]],
                  ushort             lane [[thread_index_in_simdgroup]],
                  ushort             simdgroups [[simdgroups_per_threadgroup]]) {
    const uint at = (group.z * groups.y * groups.x + group.y * groups.x + group.x) * threads.x * threads.y * threads.z;

    y[at + index] = { in_grid, group, groups, in_group, threads, index, simdgroup, lane, simdgroups };
}

// One row of 64 results for each operation; x: one value for each thread of a threadgroup of two simdgroups.
kernel void lanes(device const float * x,
                  device float *       y,
                  ushort               i [[thread_index_in_threadgroup]],
                  ushort               lane [[thread_index_in_simdgroup]]) {
    const float v = x[i];

    y[0 * 64 + i]  = simd_sum(v);
    y[1 * 64 + i]  = simd_max(v);
    y[2 * 64 + i]  = simd_min(v);
    y[3 * 64 + i]  = simd_prefix_inclusive_sum(v);
    y[4 * 64 + i]  = simd_prefix_exclusive_sum(v);
    y[5 * 64 + i]  = simd_shuffle(v, 31 - lane);
    y[6 * 64 + i]  = simd_shuffle_xor(v, 5);
    y[7 * 64 + i]  = simd_shuffle_down(v, 3);
    y[8 * 64 + i]  = simd_shuffle_up(v, 3);
    y[9 * 64 + i]  = simd_broadcast(v, 7);
    y[10 * 64 + i] = simd_any(v > 60.0f) ? 1.0f : 0.0f;
    y[11 * 64 + i] = simd_all(v < 60.0f) ? 1.0f : 0.0f;
    y[12 * 64 + i] = dot(simd_sum(float2(v, 1.0f)), float2(0.0f, 1.0f));
}

// c = a*b + d of 8x8; a transposed, b in threadgroup memory, c at a stride of 16.
template <typename T>
kernel void product(device const T *     a,
                    device const T *     b,
                    device const float * d,
                    device float *       c,
                    threadgroup T *      s [[threadgroup(0)]],
                    ushort               lane [[thread_index_in_simdgroup]]) {
    for (short i = lane; i < 64; i += 32) {
        s[i] = b[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    simdgroup_matrix<T, 8, 8> ma, mb;
    simdgroup_float8x8        mc;

    simdgroup_load(ma, a, 8, 0, true);
    simdgroup_load(mb, s, 8);
    simdgroup_load(mc, d, 8);
    simdgroup_multiply_accumulate(mc, ma, mb, mc);
    simdgroup_store(mc, c, 16, 0, false);

    const simdgroup_float8x8 unit(2.0f);

    simdgroup_store(unit, c, 16, ulong2(8, 0), false);
}

typedef decltype(product<float>) product_t;

template [[host_name("product_f32")]] kernel product_t  product<float>;
template [[host_name("product_f16")]] kernel product_t  product<half>;
template [[host_name("product_bf16")]] kernel product_t product<bfloat>;

// Sums of x in half, bfloat and float, each rounded after every addition.
kernel void narrow(device const float * x, device float * y, constant int & n) {
    half   a = 0.0h;
    bfloat b = 0.0f;
    float4 c = 0.0f;

    for (int i = 0; i < n; i++) {
        a += half(x[i]);
        b += bfloat(x[i]);
        c += float4(half4(x[i], 1, 2, 3));
    }
    y[0] = a;
    y[1] = b;
    y[2] = c.x + c[3];
    y[3] = as_type<float>(0x40490fdbu);
    y[4] = max(short(3), short(-4)) + min(2, short(9)) + clamp(7.5f, 0, 5) + abs(-2);
    y[5] = select(1.0f, 2.0f, x[0] < 0) + dot(float2(1, 2), float2(3, 4));
    y[6] = precise::tanh(0.5f) + rsqrt(4.0f) + sign(-3.0f);
    y[7] = float2x4(float4(1), float4(2))[1][3] + float(half2x4(float2x4(float4(3), float4(4)))[0][0]);
}

kernel void swizzles(device float * y) {
    float4 a = float4(1, 2, 3, 4);
    float3 b = a.zyx;
    int4   n = int4(5, 6, 7, 8);

    a.xz = float2(10, 30);
    a.wy += b.xy * 2.0f;
    a.yzw *= 2.0f;
    b.zx  = b.xz;
    n.xyz = n.yzx;

    thread float4 * p = &a;
    p->xw -= 0.5f;

    *(device float4 *) (y + 0) = a;
    *(device float4 *) (y + 4) = float4(b, dot(a.xy, b.yz));
    *(device float4 *) (y + 8) = float4(n);
}

constant short FC_n [[function_constant(3)]];
constant int   FC_m [[function_constant(4)]];
constant bool  FC_b [[function_constant(5)]];

kernel void constants(device float * y) {
    y[0] = FC_b ? FC_n : FC_m;
}

// Each thread adds to one of four counters.
kernel void count(device float *           y,
                  threadgroup atomic_int * counters [[threadgroup(0)]],
                  ushort                   i [[thread_index_in_threadgroup]]) {
    float filled[4] = { [0 ... 3] = 0.5f };

    if (i < 4) {
        atomic_store_explicit(&counters[i], 0, memory_order_relaxed);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_add_explicit(&counters[i % 4], int(i), memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (i < 4) {
        y[i] = float(atomic_load_explicit(&counters[i], memory_order_relaxed)) + filled[i];
    }
}
