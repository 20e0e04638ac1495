uint col = thread_position_in_grid.x, slice = thread_position_in_threadgroup.y;
uint head = thread_position_in_grid.z;
uint lane = thread_index_in_simdgroup;
uint S = q_shape[1], DQK = q_shape[2], DV = v_shape[2];
threadgroup float num_parts[SLICES * 32];
threadgroup float denom_parts[SLICES * 32];

// every eighth row of one column of C, and of n
float c[ROWS];
float total[ROWS];
for (uint r = 0; r < ROWS; r++) {
    uint d = r * SLICES + slice, at = head * DQK + d;
    c[r] = d < DQK && col < DV ? C[at * DV + col] : 0.0f;
    total[r] = d < DQK ? n[at] : 0.0f;
}
float m0 = m[head];

for (uint t = 0; t < S; t++) {
    uint token = head * S + t;
    float m1 = metal::max(log_f[token] + m0, i[token]);
    float F = metal::exp(log_f[token] + m0 - m1), I = metal::exp(i[token] - m1);
    float num = 0.0f, denom = 0.0f, value = col < DV ? static_cast<float>(v[token * DV + col]) : 0.0f;
    for (uint r = 0; r < ROWS; r++) {
        uint d = r * SLICES + slice;
        if (d < DQK) {
            float key = I * static_cast<float>(k[token * DQK + d]);
            float query = scalars[0] * static_cast<float>(q[token * DQK + d]);
            total[r] = F * total[r] + key;
            c[r] = F * c[r] + key * value;
            num += query * c[r];
            denom += query * total[r];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup); // the sums of the token before have been read
    num_parts[slice * 32 + lane] = num;
    denom_parts[slice * 32 + lane] = denom;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (slice == 0 && col < DV) {
        for (uint s = 1; s < SLICES; s++) {
            num += num_parts[s * 32 + lane];
            denom += denom_parts[s * 32 + lane];
        }
        float top = metal::max(m1, 0.0f), scale = metal::exp(m1 - top);
        h[token * DV + col] = num * scale / (metal::max(metal::abs(denom) * scale, metal::exp(-top)) + scalars[1] * scale);
    }
    m0 = m1;
}

for (uint r = 0; r < ROWS; r++) {
    uint d = r * SLICES + slice, at = head * DQK + d;
    if (d < DQK && col < DV) C_out[at * DV + col] = c[r];
    if (d < DQK && col == 0) n_out[at] = total[r];
}
if (slice == 0 && col == 0) m_out[head] = m0;
