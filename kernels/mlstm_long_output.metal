uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.x / 32;
uint L = q_shape[3], DQK = q_shape[4], DV = inside_shape[4], chunk = row / L;
float dot = 0.0f;
for (uint d = lane; d < DQK; d += 32) dot += static_cast<float>(q[row * DQK + d]) * n_states[chunk * DQK + d];
float m1 = m[row], w = scalars[0] * metal::exp(b[row] + m_states[chunk] - m1);
float den = sums[row] + w * simd_sum(dot);
float top = metal::max(m1, 0.0f), shrink = metal::exp(m1 - top), floor = metal::exp(-top);
float factor = shrink / (metal::max(metal::abs(den) * shrink, floor) + scalars[1] * shrink);
for (uint d0 = lane; d0 < DV; d0 += 128) {
    float read[4];
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j, at = row * DV + d;
        read[j] = d < DV ? static_cast<float>(inside[at]) + w * static_cast<float>(before[at]) : 0.0f;
    }
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j;
        if (d < DV) h[row * DV + d] = factor * read[j];
    }
}
if (lane == 0) {
    gain[row] = factor;
    denom_sign[row] = metal::abs(den) * shrink > floor ? (den > 0.0f ? 1.0f : -1.0f) : 0.0f;
}
