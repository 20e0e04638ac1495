uint slice = thread_position_in_threadgroup.y, lane = thread_index_in_simdgroup;
uint first = threadgroup_position_in_grid.x * 32 * COLUMNS + lane, head = thread_position_in_grid.z;
uint NH = k_shape[1], DQK = k_shape[3], DV = v_shape[3];

// gates, as exponents
float log_f = log_sigmoid(static_cast<float>(f[head])), ig = static_cast<float>(i[head]), m0 = m[head];
bool token = mask[head / NH];
if (!token) { log_f = 0.0f; ig = -1e9f; }
float m1 = metal::max(log_f + m0, ig);
float F = metal::exp(log_f + m0 - m1), I = metal::exp(ig - m1);

// every eighth row of some columns, eight elements at once: read, forget, add, read out
const uint ROWS = 8 / COLUMNS;
float denom = 0.0f;
float num[COLUMNS];
float value[COLUMNS];
for (uint a = 0; a < COLUMNS; a++) {
    uint col = first + 32 * a;
    num[a] = 0.0f;
    value[a] = token && col < DV ? static_cast<float>(v[head * DV + col]) : 0.0f;
}
for (uint d0 = slice; d0 < DQK; d0 += SLICES * ROWS) {
    float c[8];
    float total[ROWS];
    float key[ROWS];
    float query[ROWS];
    for (uint j = 0; j < ROWS; j++) {
        uint d = d0 + j * SLICES, at = head * DQK + d;
        bool inside = d < DQK;
        for (uint a = 0; a < COLUMNS; a++) {
            uint col = first + 32 * a;
            c[j * COLUMNS + a] = inside && col < DV ? C[at * DV + col] : 0.0f;
        }
        total[j] = inside ? n[at] : 0.0f;
        key[j] = inside && token ? I * static_cast<float>(k[at]) : 0.0f;
        query[j] = inside ? scalars[0] * static_cast<float>(q[at]) : 0.0f;
    }
    for (uint j = 0; j < ROWS; j++) {
        uint d = d0 + j * SLICES, at = head * DQK + d;
        total[j] = F * total[j] + key[j];
        denom += query[j] * total[j];
        if (d < DQK && first == 0) n_out[at] = total[j];
        for (uint a = 0; a < COLUMNS; a++) {
            uint col = first + 32 * a;
            float x = F * c[j * COLUMNS + a] + key[j] * value[a];
            num[a] += query[j] * x;
            if (d < DQK && col < DV) C_out[at * DV + col] = x;
        }
    }
}

// eight partial sums become one
threadgroup float num_parts[SLICES * 32 * COLUMNS];
threadgroup float denom_parts[SLICES * 32];
for (uint a = 0; a < COLUMNS; a++) num_parts[(slice * COLUMNS + a) * 32 + lane] = num[a];
denom_parts[slice * 32 + lane] = denom;
threadgroup_barrier(mem_flags::mem_threadgroup);
uint col = first + 32 * slice;
if (slice < COLUMNS && col < DV) {
    float sum = 0.0f, den = 0.0f;
    for (uint s = 0; s < SLICES; s++) {
        sum += num_parts[(s * COLUMNS + slice) * 32 + lane];
        den += denom_parts[s * 32 + lane];
    }
    float top = metal::max(m1, 0.0f), scale = metal::exp(m1 - top);
    h[head * DV + col] = sum * scale / (metal::max(metal::abs(den) * scale, metal::exp(-top)) + scalars[1] * scale);
}
if (slice == 0 && first == 0) m_out[head] = m1;
