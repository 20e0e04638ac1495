uint t = thread_index_in_threadgroup, group = simdgroup_index_in_threadgroup;
uint head = threadgroup_position_in_grid.z;
uint row0 = threadgroup_position_in_grid.y * 32, col0 = threadgroup_position_in_grid.x * 32;
uint S = k_shape[1], DQK = k_shape[2], DV = v_shape[2], NC = (S + 63) / 64;
threadgroup float keys[32 * 64];   // transposed: a row for each channel
threadgroup float values[64 * 32];
threadgroup float tile[32 * 32];
threadgroup float a[64];

// a SIMD group holds 16 by 16 of the 32 by 32 numbers of C, in four matrices
uint r0 = group / 2 * 16, c0 = group % 2 * 16;
simdgroup_float8x8 acc[4];
for (uint e = t; e < 1024; e += 128) {
    uint r = row0 + e / 32, c = col0 + e % 32;
    tile[e] = r < DQK && c < DV ? C[(head * DQK + r) * DV + c] : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint j = 0; j < 4; j++) simdgroup_load(acc[j], tile + ((r0 + j / 2 * 8) * 32 + c0 + j % 2 * 8), 32);
bool mine = t < 32 && row0 + t < DQK;  // this thread also holds one number of n
float total = mine ? n[head * DQK + row0 + t] : 0.0f, m0 = m[head];

for (uint chunk = 0; chunk <= NC; chunk++) {
    // the state before this chunk, or after the last one
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint j = 0; j < 4; j++) simdgroup_store(acc[j], tile + ((r0 + j / 2 * 8) * 32 + c0 + j % 2 * 8), 32);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < 1024; e += 128) {
        uint r = row0 + e / 32, c = col0 + e % 32;
        if (r < DQK && c < DV) states[((head * (NC + 1) + chunk) * DQK + r) * DV + c] = tile[e];
    }
    if (mine && col0 == 0) totals[(head * (NC + 1) + chunk) * DQK + row0 + t] = total;
    if (t == 0 && row0 == 0 && col0 == 0) scales[head * (NC + 1) + chunk] = m0;
    if (chunk == NC) break;

    // the exponent with which each token survives the chunk
    uint from = chunk * 64, length = metal::min(64u, S - from);
    if (t < 64) {
        float sum = 0.0f;
        for (uint j = t + 1; j < length; j++) sum += log_f[head * S + from + j];
        a[t] = t < length ? sum + i[head * S + from + t] : -1e9f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float g = 0.0f, m1 = -1e9f;
    for (uint j = 0; j < length; j++) {
        g += log_f[head * S + from + j];
        m1 = metal::max(m1, a[j]);
    }
    m1 = metal::max(m1, g + m0);
    float F = metal::exp(g + m0 - m1);

    for (uint e = t; e < 2048; e += 128) {
        uint l = e / 32, c = e % 32;
        bool token = l < length;
        uint at = head * S + from + l;
        float key = 0.0f, value = 0.0f;
        if (token && row0 + c < DQK) key = metal::exp(a[l] - m1) * static_cast<float>(k[at * DQK + row0 + c]);
        if (token && col0 + c < DV) value = static_cast<float>(v[at * DV + col0 + c]);
        keys[c * 64 + l] = key;
        values[e] = value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    // forget, then add the products of keys and values
    for (uint j = 0; j < 4; j++) { acc[j].thread_elements()[0] *= F; acc[j].thread_elements()[1] *= F; }
    for (uint l = 0; l < 64; l += 8) {
        simdgroup_float8x8 k0, k1, v0, v1;
        simdgroup_load(k0, keys + (r0 * 64 + l), 64);
        simdgroup_load(k1, keys + ((r0 + 8) * 64 + l), 64);
        simdgroup_load(v0, values + (l * 32 + c0), 32);
        simdgroup_load(v1, values + (l * 32 + c0 + 8), 32);
        simdgroup_multiply_accumulate(acc[0], k0, v0, acc[0]);
        simdgroup_multiply_accumulate(acc[1], k0, v1, acc[1]);
        simdgroup_multiply_accumulate(acc[2], k1, v0, acc[2]);
        simdgroup_multiply_accumulate(acc[3], k1, v1, acc[3]);
    }
    if (mine) {
        total *= F;
        for (uint l = 0; l < length; l++) total += keys[t * 64 + l];
    }
    m0 = m1;
}
