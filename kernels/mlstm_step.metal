uint col = thread_position_in_grid.x;
uint slice = thread_position_in_threadgroup.y;
uint head = thread_position_in_grid.z;
uint lane = thread_index_in_simdgroup;
uint NH = k_shape[1], DQK = k_shape[3], DV = v_shape[3];

// gates, as exponents
float log_f = log_sigmoid(static_cast<float>(f[head])), ig = static_cast<float>(i[head]), m0 = m[head];
bool token = mask[head / NH];
if (!token) { log_f = 0.0f; ig = -1e9f; }
float m1 = metal::max(log_f + m0, ig);
float F = metal::exp(log_f + m0 - m1), I = metal::exp(ig - m1);

// every eighth row of one column, eight of them at once: read, forget, add, read out
float num = 0.0f, denom = 0.0f;
float value = token && col < DV ? static_cast<float>(v[head * DV + col]) : 0.0f;
for (uint d0 = slice; d0 < DQK; d0 += SLICES * 8) {
    float c[8];
    float total[8];
    float key[8];
    float query[8];
    for (uint j = 0; j < 8; j++) {
        uint d = d0 + j * SLICES, at = head * DQK + d;
        bool inside = d < DQK;
        c[j] = inside && col < DV ? C[at * DV + col] : 0.0f;
        total[j] = inside ? n[at] : 0.0f;
        key[j] = inside && token ? I * static_cast<float>(k[at]) : 0.0f;
        query[j] = inside ? scalars[0] * static_cast<float>(q[at]) : 0.0f;
    }
    for (uint j = 0; j < 8; j++) {
        uint d = d0 + j * SLICES, at = head * DQK + d;
        total[j] = F * total[j] + key[j];
        c[j] = F * c[j] + key[j] * value;
        denom += query[j] * total[j];
        num += query[j] * c[j];
        if (d < DQK && col == 0) n_out[at] = total[j];
        if (d < DQK && col < DV) C_out[at * DV + col] = c[j];
    }
}

// eight partial sums become one
threadgroup float num_parts[SLICES * 32];
threadgroup float denom_parts[SLICES * 32];
num_parts[slice * 32 + lane] = num;
denom_parts[slice * 32 + lane] = denom;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (slice == 0 && col < DV) {
    for (uint s = 1; s < SLICES; s++) {
        num += num_parts[s * 32 + lane];
        denom += denom_parts[s * 32 + lane];
    }
    float top = metal::max(m1, 0.0f), scale = metal::exp(m1 - top);
    h[head * DV + col] = num * scale / (metal::max(metal::abs(denom) * scale, metal::exp(-top)) + scalars[1] * scale);
}
if (slice == 0 && col == 0) m_out[head] = m1;
