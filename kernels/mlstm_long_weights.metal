uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.x / 32;
uint L = scores_shape[4], chunk = row / L;
uint from = chunk * L, t = row - from;
float m0 = m_states[chunk], m1 = b[row] + metal::max(top[row], m0), shift = b[row] - m1, den = 0.0f;
for (uint s = lane; s < L; s += 32) {
    float weight = 0.0f;
    if (s <= t) weight = scale[0] * static_cast<float>(scores[row * L + s]) * metal::exp(shift + e[from + s]);
    T rounded = static_cast<T>(weight);
    weights[row * L + s] = rounded;
    den += static_cast<float>(rounded);
}
den = simd_sum(den);
if (lane == 0) {
    m[row] = m1;
    sums[row] = den;
}
