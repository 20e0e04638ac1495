uint slice = thread_position_in_threadgroup.y, lane = thread_index_in_simdgroup, own = thread_index_in_threadgroup;
uint first = threadgroup_position_in_grid.x * 32 * COLUMNS + lane, head = thread_position_in_grid.z;
uint NH = k_shape[1], DQK = k_shape[3], DV = v_shape[3], places = old_i_shape[2], row = head / NH;

// gates of all places, as exponents
threadgroup float decay[256];
threadgroup float exponent[256];
threadgroup float weight[256];
bool token = own < places ? real[row * places + own] : own == places && mask[row];
float ig = own < places ? old_i[head * places + own] : own == places ? static_cast<float>(i[head]) : 0.0f;
float fg = own < places ? old_f[head * places + own] : own == places ? static_cast<float>(f[head]) : 0.0f;
decay[own] = token ? log_sigmoid(fg) : 0.0f;
threadgroup_barrier(mem_flags::mem_threadgroup);
float after = 0.0f;
for (uint s = own + 1; s <= places; s++) after += decay[s];
exponent[own] = token ? ig + after : -1e9f;
threadgroup_barrier(mem_flags::mem_threadgroup);
float left = m[head], m1 = -1e9f;
for (uint s = 0; s <= places; s++) {
    left += decay[s];
    m1 = metal::max(m1, exponent[s]);
}
m1 = metal::max(m1, left);

// every eighth row of some columns, eight elements at once
const uint ROWS = 8 / COLUMNS;
float denom = 0.0f;
float num[COLUMNS];
for (uint a = 0; a < COLUMNS; a++) num[a] = 0.0f;
for (uint d0 = slice; d0 < DQK; d0 += SLICES * ROWS) {
    for (uint j = 0; j < ROWS; j++) {
        uint d = d0 + j * SLICES, at = head * DQK + d;
        if (d >= DQK) continue;
        float query = scalars[0] * static_cast<float>(q[at]);
        denom += query * n[at];
        for (uint a = 0; a < COLUMNS; a++) {
            uint col = first + 32 * a;
            if (col < DV) num[a] += query * C[at * DV + col];
        }
    }
}
float F = metal::exp(left - m1);
denom *= F;
for (uint a = 0; a < COLUMNS; a++) num[a] *= F;

// weights of the places, and their keys
bool leads = threadgroup_position_in_grid.x == 0;
for (uint s = slice; s <= places; s += SLICES) {
    float dot = 0.0f;
    for (uint d = lane; d < DQK; d += 32) {
        T key = s < places ? old_k[(head * places + s) * DQK + d] : k[head * DQK + d];
        dot += static_cast<float>(q[head * DQK + d]) * static_cast<float>(key);
        if (leads) k_out[(head * (places + 1) + s) * DQK + d] = key;
    }
    dot = simd_sum(dot);
    bool there = s < places ? real[row * places + s] : mask[row];
    float w = there ? scalars[0] * dot * metal::exp(exponent[s] - m1) : 0.0f;
    denom += w;
    for (uint a = 0; a < COLUMNS; a++) {
        uint col = first + 32 * a;
        if (col >= DV) continue;
        T value = s < places ? old_v[(head * places + s) * DV + col] : v[head * DV + col];
        if (there) num[a] += w * static_cast<float>(value);
        v_out[(head * (places + 1) + s) * DV + col] = value;
    }
}
if (leads && own <= places) {
    i_out[head * (places + 1) + own] = ig;
    f_out[head * (places + 1) + own] = fg;
    if (head % NH == 0) real_out[row * (places + 1) + own] = token;
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
