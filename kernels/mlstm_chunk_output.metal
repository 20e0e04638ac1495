uint t = thread_index_in_threadgroup, group = simdgroup_index_in_threadgroup;
uint head = threadgroup_position_in_grid.z, chunk = threadgroup_position_in_grid.y;
uint col0 = threadgroup_position_in_grid.x * 64;
uint S = x_shape[1], D = x_shape[2], E = y_shape[2], NC = (S + 63) / 64;
uint from = chunk * 64, length = metal::min(64u, S - from), first = head * S + from;
uint state = head * (NC + 1) + chunk + TRANSPOSE, square = (head * NC + chunk) * 4096;
threadgroup float stage[64 * 40 + 32 * 72];
auto left = stage + 0, right = stage + 64 * 40;
simdgroup_float8x8 acc[8];
clear_tile(acc);

// rows with the state, 32 channels at a time
for (uint d0 = 0; d0 < D; d0 += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < 2048; e += 256) {
        uint r = e / 32, d = d0 + e % 32, row = d0 + e / 64, c = col0 + e % 64;
        float value = 0.0f;
        if (r < length && d < D) value = a[first + r] * static_cast<float>(x[(first + r) * D + d]);
        left[r * 40 + e % 32] = value;
        right[e / 64 * 72 + e % 64] = row < D && c < E ? states[(state * D + row) * E + c] : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint d = 0; d < 32; d += 8) multiply_tile<false, false>(acc, left, right, group, d);
}

// weights with the other tokens of the chunk, 32 at a time
for (uint l0 = 0; l0 < length; l0 += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < 2048; e += 256) {
        uint l = l0 + e / 64, c = col0 + e % 64;
        if (TRANSPOSE) left[e / 64 * 72 + e % 64] = w[square + l * 64 + e % 64];
        else left[e / 32 * 40 + e % 32] = w[square + e / 32 * 64 + l0 + e % 32];
        right[e / 64 * 72 + e % 64] = l < length && c < E ? static_cast<float>(y[(first + l) * E + c]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint l = 0; l < 32; l += 8)
        if (TRANSPOSE ? l0 + l + 8 > tile_row(group) : l0 + l <= tile_row(group) + 15) // else all zero
            multiply_tile<TRANSPOSE, false>(acc, left, right, group, l);
}

// what is read, over the denominator
store_tile(acc, stage + 0, group);
for (uint e = t; e < 4096; e += 256) {
    uint r = e / 64, c = col0 + e % 64;
    if (r < length && c < E) out[(first + r) * E + c] = stage[r * 72 + e % 64] * (TRANSPOSE ? 1.0f : gain[first + r]);
}
