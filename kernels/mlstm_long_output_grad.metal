uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.x / 32;
uint L = h_shape[3], DV = h_shape[4], DQK = q_shape[4], chunk = row / L;
float w = scalars[0] * metal::exp(b[row] + m_states[chunk] - m[row]), factor = gain[row], along = 0.0f, seen = 0.0f, dot = 0.0f;
for (uint d0 = lane; d0 < DV; d0 += 128) {
    float x[4];
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j, at = row * DV + d;
        bool here = d < DV;
        float grad = here ? dh[at] : 0.0f;
        x[j] = factor * grad;
        along += here ? grad * h[at] : 0.0f;
        seen += here ? x[j] * static_cast<float>(before[at]) : 0.0f;
    }
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j, at = row * DV + d;
        if (d < DV) dinside[at] = static_cast<T>(x[j]);
        if (d < DV) dbefore[at] = static_cast<T>(w * x[j]);
    }
}
for (uint d = lane; d < DQK; d += 32) dot += static_cast<float>(q[row * DQK + d]) * n_states[chunk * DQK + d];
float straight = simd_sum(along);
along = factor * straight;
seen = simd_sum(seen);
dot = simd_sum(dot);
if (lane == 0) {
    float sum = -denom_sign[row] * along;
    dsums[row] = sum;
    dcarry[row] = w * sum;
    carried[row] = w * (seen + sum * dot);
    db[row] = denom_sign[row] == 0.0f ? straight - scalars[1] * along : 0.0f;
}
