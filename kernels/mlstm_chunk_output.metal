uint t = thread_index_in_threadgroup;
uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint head = threadgroup_position_in_grid.z, chunk = threadgroup_position_in_grid.y;
uint col0 = threadgroup_position_in_grid.x * 64;
uint S = q_shape[1], DQK = q_shape[2], DV = v_shape[2], NC = (S + 63) / 64;
uint from = chunk * 64, length = metal::min(64u, S - from), before = head * (NC + 1) + chunk;
uint row0 = group * 8;              // a SIMD group owns 8 of the 64 rows
float scale = numbers[0], eps = numbers[1];
threadgroup float weights[64 * 64]; // of every token for every later one
threadgroup float left[64 * 16];
threadgroup float right[16 * 64];
threadgroup float result[8 * 64];
threadgroup float forget[64];
threadgroup float enter[64];
threadgroup float carries[64];
threadgroup float dens[64];
if (t < 64) {
    forget[t] = t < length ? log_f[head * S + from + t] : 0.0f;
    enter[t] = t < length ? i[head * S + from + t] : -1e9f;
}

// queries with keys, 16 channels at a time; tokens that come later are left out
simdgroup_float8x8 acc[8];
for (uint j = 0; j < 8; j++) acc[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
for (uint d0 = 0; d0 < DQK; d0 += 16) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < 1024; e += 256) {
        uint r = e / 16, c = e % 16;
        bool inside = r < length && d0 + c < DQK;
        uint at = (head * S + from + r) * DQK + d0 + c;
        left[e] = inside ? scale * static_cast<float>(q[at]) : 0.0f;
        right[c * 64 + r] = inside ? static_cast<float>(k[at]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint d = 0; d < 16; d += 8) {
        simdgroup_float8x8 x, y;
        simdgroup_load(x, left + (row0 * 16 + d), 16);
        for (uint j = 0; j <= group; j++) {
            simdgroup_load(y, right + (d * 64 + j * 8), 64);
            simdgroup_multiply_accumulate(acc[j], x, y, acc[j]);
        }
    }
}
for (uint j = 0; j < 8; j++) simdgroup_store(acc[j], weights + (row0 * 64 + j * 8), 64);
simdgroup_barrier(mem_flags::mem_threadgroup);

// the decay of each row; its sums are made one by one, so that nothing cancels
float m0 = scales[before];
for (uint row = row0; row < row0 + 8; row++) {
    float b = 0.0f, e0 = -1e9f, e1 = -1e9f;
    for (uint j = 0; j <= row; j++) b += forget[j];
    if (lane <= row) {
        e0 = enter[lane];
        for (uint j = lane + 1; j <= row; j++) e0 += forget[j];
    }
    if (lane + 32 <= row) {
        e1 = enter[lane + 32];
        for (uint j = lane + 33; j <= row; j++) e1 += forget[j];
    }
    float m1 = metal::max(simd_max(metal::max(e0, e1)), b + m0);
    uint at = row * 64 + lane;
    float w0 = weights[at] * metal::exp(e0 - m1), w1 = weights[at + 32] * metal::exp(e1 - m1);
    weights[at] = w0;
    weights[at + 32] = w1;
    float dot = 0.0f;
    for (uint d = lane; d < DQK && row < length; d += 32)
        dot += static_cast<float>(q[(head * S + from + row) * DQK + d]) * totals[before * DQK + d];
    float carry = metal::exp(b + m0 - m1);
    float den = simd_sum(w0 + w1) + carry * scale * simd_sum(dot);
    if (lane == 0) {
        carries[row] = carry;
        dens[row] = metal::max(metal::abs(den), metal::exp(-m1)) + eps;
    }
}

// weights with values
for (uint j = 0; j < 8; j++) acc[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
for (uint l0 = 0; l0 < 64; l0 += 16) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < 1024; e += 256) {
        uint l = l0 + e / 64, c = col0 + e % 64;
        right[e] = l < length && c < DV ? static_cast<float>(v[(head * S + from + l) * DV + c]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint l = 0; l < 16 && l0 + l <= row0; l += 8) {
        simdgroup_float8x8 x, y;
        simdgroup_load(x, weights + (row0 * 64 + l0 + l), 64);
        for (uint j = 0; j < 8; j++) {
            simdgroup_load(y, right + (l * 64 + j * 8), 64);
            simdgroup_multiply_accumulate(acc[j], x, y, acc[j]);
        }
    }
}

// queries with the state before the chunk
for (uint d0 = 0; d0 < DQK; d0 += 16) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < 1024; e += 256) {
        uint r = e / 16, d = d0 + e % 16;
        float query = 0.0f;
        if (r < length && d < DQK) query = static_cast<float>(q[(head * S + from + r) * DQK + d]);
        left[e] = carries[r] * scale * query;
        uint row = d0 + e / 64, c = col0 + e % 64;
        right[e] = row < DQK && c < DV ? states[(before * DQK + row) * DV + c] : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint d = 0; d < 16; d += 8) {
        simdgroup_float8x8 x, y;
        simdgroup_load(x, left + (row0 * 16 + d), 16);
        for (uint j = 0; j < 8; j++) {
            simdgroup_load(y, right + (d * 64 + j * 8), 64);
            simdgroup_multiply_accumulate(acc[j], x, y, acc[j]);
        }
    }
}

// divide and write
for (uint j = 0; j < 8; j++) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_store(acc[j], result + group * 64, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = lane; e < 64; e += 32) {
        uint r = row0 + e / 8, c = col0 + j * 8 + e % 8;
        if (r < length && c < DV) h[(head * S + from + r) * DV + c] = result[group * 64 + e] / dens[r];
    }
}
