// One kernel for each kind of fault that the emulator finds.

#include <metal_stdlib>

using namespace metal;

struct arguments {
    int count;
    int shift;
};

kernel void
copy(constant arguments & args, device const float * x, device float * y, uint i [[thread_position_in_grid]]) {
    y[i] = x[int(i) + args.shift];
}

kernel void
copy_shifted(constant arguments & args, device const float * x, device float * y, uint i [[thread_position_in_grid]]) {
    y[int(i) + args.shift] = x[i];
}

kernel void
copy_vectors(constant arguments & args, device const float * x, device float * y, uint i [[thread_position_in_grid]]) {
    const float4 v = *(device const float4 *) (x + i * args.shift);
    y[i]           = v.x;
}

constant float table[4] = { 1, 2, 3, 4 };

kernel void read_table(constant arguments & args, device float * y, uint i [[thread_position_in_grid]]) {
    y[i] = table[i + args.shift];
}

kernel void
read_constants(constant float * x, constant arguments & args, device float * y, uint i [[thread_position_in_grid]]) {
    y[i] = x[i + args.shift];
}

kernel void write_argument(constant arguments & args,
                           device float *       y,
                           threadgroup float *  s [[threadgroup(0)]],
                           uint                 i [[thread_position_in_threadgroup]]) {
    s[int(i) + args.shift] = 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = s[i];
}

kernel void write_array(constant arguments & args, device float * y, uint i [[thread_position_in_threadgroup]]) {
    threadgroup float   s[32];
    threadgroup float * p = s;

    p[int(i) + args.shift] = 1;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = p[i];
}

kernel void read_unwritten(device float * y, uint i [[thread_position_in_threadgroup]]) {
    threadgroup float s[32];

    if (i != 7) {
        s[i] = 1;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = s[31 - i];
}

kernel void early_return(device float * y, uint i [[thread_position_in_threadgroup]]) {
    if (i >= 40) {
        return;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = 1;
}

kernel void two_barriers(device float * y, uint i [[thread_position_in_threadgroup]]) {
    if (i < 32) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    } else {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    y[i] = 1;
}

kernel void two_sums(device float * y, uint i [[thread_position_in_threadgroup]]) {
    if (i < 16) {
        y[i] = simd_sum(1.0f);
    } else {
        y[i] = simd_sum(2.0f);
    }
}

kernel void sum_or_barrier(device float * y, uint i [[thread_position_in_threadgroup]]) {
    if (i == 5) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
    } else {
        y[i] = simd_sum(1.0f);
    }
}

kernel void half_a_matrix(device float * y, uint i [[thread_position_in_threadgroup]]) {
    if (i < 16) {
        return;
    }
    simdgroup_float8x8 m = make_filled_simdgroup_matrix<float, 8>(1.0f);
    simdgroup_store(m, y, 8);
}

kernel void matrices_of_lanes(device float * y, uint i [[thread_position_in_threadgroup]]) {
    simdgroup_float8x8 m = make_filled_simdgroup_matrix<float, 8>(1.0f);
    simdgroup_store(m, y + i, 8);
}

kernel void race(device float * y, uint i [[thread_position_in_threadgroup]]) {
    threadgroup float s[64];

    s[i] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    s[i] = float(i);
    y[i] = s[63 - i];
}

kernel void race_of_lanes(device float * y, uint i [[thread_position_in_threadgroup]]) {
    threadgroup float s[16];

    s[i % 16] = float(i);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = s[i % 16];
}

// Equal values, and values that a barrier separates.
kernel void rewrite(device float * y, uint i [[thread_position_in_threadgroup]]) {
    threadgroup float s[1];

    s[0] = 1;
    y[0] = 2;
    simdgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    if (i == 5) {
        s[0] = 3;
        y[0] = 4;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    y[i + 1] = s[0] + y[0];
}

kernel void overlap(device float * y, uint i [[thread_position_in_threadgroup]]) {
    y[i / 2] = float(i);
}

kernel void read_after_barrier(device float * y, uint i [[thread_position_in_threadgroup]]) {
    y[i] = float(i);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[i + 64] = y[63 - i];
}

kernel void barrier_without_memory(device float * y, uint i [[thread_position_in_threadgroup]]) {
    threadgroup float s[64];

    s[i] = float(i);
    threadgroup_barrier(mem_flags::mem_none);
    y[i] = s[63 - i];
}

kernel void order_of_lanes(device float * y, uint i [[thread_position_in_threadgroup]]) {
    threadgroup atomic_uint n;

    if (i == 0) {
        atomic_store_explicit(&n, 0u, memory_order_relaxed);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    y[i] = float(atomic_fetch_add_explicit(&n, 1u, memory_order_relaxed));
}

kernel void local_array(constant arguments & args, device float * y) {
    float a[4] = { 1, 2, 3, 4 };

    y[0] = a[args.shift];
}

kernel void divide(constant arguments & args, device int * y) {
    y[0] = 7 / args.shift;
}

kernel void shift(constant arguments & args, device int * y) {
    y[0] = 7 << args.shift;
}

constant short FC_factor [[function_constant(7)]];

kernel void scale(device const float * x, device float * y, uint i [[thread_position_in_grid]]) {
    y[i] = x[i] * FC_factor;
}

kernel void write_row(device float * y, uint i [[thread_position_in_grid]]) {
    y[i % 32] = float(i);
}

kernel void read_previous(device float * y, uint i [[thread_position_in_grid]]) {
    y[i] = i >= 32 ? y[i - 32] : 1;
}

kernel void count_atomically(device atomic_uint * y, uint i [[thread_position_in_grid]]) {
    atomic_fetch_add_explicit(&y[i % 32], 1u, memory_order_relaxed);
}
