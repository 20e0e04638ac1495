uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.x / 32;
uint L = scores_shape[4], chunk = row / L;
uint from = chunk * L, t = row - from;
float m0 = m_states[chunk], m1 = b[row] + metal::max(top[row], m0), shift = b[row] - m1, den = 0.0f;
for (uint s0 = lane; s0 < L; s0 += 128) {
    T rounded[4];
    for (uint j = 0; j < 4; j++) {
        uint s = s0 + 32 * j;
        float weight = 0.0f;
        if (s <= t) weight = scale[0] * static_cast<float>(scores[row * L + s]) * metal::exp(shift + e[from + s]);
        rounded[j] = static_cast<T>(weight);
        den += static_cast<float>(rounded[j]);
    }
    for (uint j = 0; j < 4; j++) {
        uint s = s0 + 32 * j;
        if (s < L) weights[row * L + s] = rounded[j];
    }
}
den = simd_sum(den);
if (lane == 0) {
    m[row] = m1;
    sums[row] = den;
}
