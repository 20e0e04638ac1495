uint t = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint head = threadgroup_position_in_grid.z, chunk = threadgroup_position_in_grid.y;
uint S = q_shape[1], DQK = q_shape[2], NC = (S + 63) / 64;
uint from = chunk * 64, length = metal::min(64u, S - from), before = head * (NC + 1) + chunk;
float scale = scalars[0], eps = scalars[1];
threadgroup float stage[64 * 76];
threadgroup float forget[64];
threadgroup float enter[64];
auto left = stage + 0, right = stage + 64 * 40;
if (t < 64) {
    forget[t] = t < length ? log_f[head * S + from + t] : 0.0f;
    enter[t] = t < length ? i[head * S + from + t] : -1e9f;
}

// queries with keys, 32 channels at a time
simdgroup_float8x8 acc[8];
clear_tile(acc);
for (uint d0 = 0; d0 < DQK; d0 += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < 2048; e += 256) {
        uint r = e / 32, d = d0 + e % 32, at = (head * S + from + r) * DQK + d, c = e % 32;
        bool inside = r < length && d < DQK;
        left[r * 40 + c] = inside ? scale * static_cast<float>(q[at]) : 0.0f;
        right[r * 36 + c] = inside ? static_cast<float>(k[at]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint d = 0; d < 32 && tile_col(group) <= tile_row(group) + 8; d += 8)
        multiply_tile<false, true>(acc, left, right, group, d);
}
store_tile(acc, stage + 0, group);

// the decay, row by row, each sum one gate longer than that of the row above; a SIMD group keeps eight rows
float m0 = m_states[before], b = 0.0f, e0 = -1e9f, e1 = -1e9f;
for (uint row = 0; row < 64; row++) {
    b += forget[row];
    e0 = row == lane ? enter[lane] : e0 + forget[row];
    e1 = row == lane + 32 ? enter[lane + 32] : e1 + forget[row];
    if (row / 8 != group) continue;
    bool p0 = lane <= row, p1 = lane + 32 <= row;
    float m1 = metal::max(simd_max(metal::max(p0 ? e0 : -1e9f, p1 ? e1 : -1e9f)), b + m0);
    float w0 = p0 ? stage[row * 72 + lane] * metal::exp(e0 - m1) : 0.0f;
    float w1 = p1 ? stage[row * 72 + lane + 32] * metal::exp(e1 - m1) : 0.0f;
    uint to = ((head * NC + chunk) * 64 + row) * 64 + lane;
    weights[to] = w0;
    weights[to + 32] = w1;
    uint token = head * S + from + row;
    float dot = 0.0f;
    for (uint d = lane; d < DQK && row < length; d += 32)
        dot += static_cast<float>(q[token * DQK + d]) * n_states[before * DQK + d];
    float carry = scale * metal::exp(b + m0 - m1), den = simd_sum(w0 + w1) + carry * simd_sum(dot);
    float top = metal::max(m1, 0.0f), shrink = metal::exp(m1 - top), floor = metal::exp(-top);
    if (lane == 0 && row < length) {
        m[token] = m1;
        inter_chunk_decay[token] = carry;
        gain[token] = shrink / (metal::max(metal::abs(den) * shrink, floor) + eps * shrink);
        denom_sign[token] = metal::abs(den) * shrink > floor ? (den > 0.0f ? 1.0f : -1.0f) : 0.0f;
    }
}
// after the last row the sums are those with which each token survives the chunk
float after = m_states[before + 1];
if (group == 0 && lane < length) decay_to_end[head * S + from + lane] = metal::exp(e0 - after);
if (group == 1 && lane + 32 < length) decay_to_end[head * S + from + lane + 32] = metal::exp(e1 - after);
