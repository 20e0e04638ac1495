uint t = thread_index_in_threadgroup, group = simdgroup_index_in_threadgroup;
uint head = threadgroup_position_in_grid.z, chunk = threadgroup_position_in_grid.y;
uint tile = threadgroup_position_in_grid.x, col0 = tile * 64;
uint S = x_shape[1], DV = x_shape[2], DQK = y_shape[2], NC = (S + 63) / 64;
uint from = chunk * 64, length = metal::min(64u, S - from), first = head * S + from;
uint state = head * (NC + 1) + chunk + TRANSPOSE, square = (head * NC + chunk) * 4096;
threadgroup float stage[64 * 76];
auto left = stage + 0, right = stage + 64 * 40;
simdgroup_float8x8 acc[8];
clear_tile(acc);

// rows with the state transposed, its last column n
for (uint d0 = 0; d0 <= DV; d0 += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < 2048; e += 256) {
        uint r = e / 32, d = d0 + e % 32, c = e % 32, row = col0 + r;
        float value = 0.0f, memory = 0.0f;
        if (r < length && d < DV) value = static_cast<float>(x[(first + r) * DV + d]);
        if (r < length && d == DV) value = one[first + r];
        if (row < DQK && d < DV) memory = states[(state * DQK + row) * DV + d];
        if (row < DQK && d == DV) memory = n_states[state * DQK + row];
        left[r * 40 + c] = r < length ? a[first + r] * value : 0.0f;
        right[r * 36 + c] = memory;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint d = 0; d < 32; d += 8) multiply_tile<false, true>(acc, left, right, group, d);
}

// what the exponents of the state want: each row's product with its own query or key
store_tile(acc, stage + 0, group);
float dot = 0.0f;
uint mine = t / 4;
for (uint c = t % 4; c < 64 && mine < length; c += 4) {
    uint col = col0 + c;
    if (col < DQK) dot += stage[mine * 72 + c] * static_cast<float>(own[(first + mine) * DQK + col]);
}
dot += simd_shuffle_xor(dot, 1);
dot += simd_shuffle_xor(dot, 2);
if (t % 4 == 0 && mine < length) dots[(head * ((DQK + 63) / 64) + tile) * S + from + mine] = dot;

// gradients of the products with the other tokens of the chunk
for (uint l0 = 0; l0 < length; l0 += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < 2048; e += 256) {
        uint l = l0 + e / 64, c = col0 + e % 64;
        if (TRANSPOSE) left[e / 64 * 72 + e % 64] = w[square + l * 64 + e % 64];
        else left[e / 32 * 40 + e % 32] = w[square + e / 32 * 64 + l0 + e % 32];
        bool inside = l < length && c < DQK;
        right[e / 64 * 72 + e % 64] = inside ? static_cast<float>(y[(first + l) * DQK + c]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint l = 0; l < 32; l += 8)
        if (TRANSPOSE ? l0 + l + 8 > tile_row(group) : l0 + l <= tile_row(group) + 15) // else all zero
            multiply_tile<TRANSPOSE, false>(acc, left, right, group, l);
}
store_tile(acc, stage + 0, group);
for (uint e = t; e < 4096; e += 256) {
    uint r = e / 64, c = col0 + e % 64;
    if (r < length && c < DQK) out[(first + r) * DQK + c] = stage[r * 72 + e % 64];
}
