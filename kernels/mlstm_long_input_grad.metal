uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.x / 32;
uint L = k_shape[3], DQK = k_shape[4], DV = dv_inside_shape[4], chunk = row / L;
float left = metal::exp(e[row] - top[chunk * L + L - 1]), along = 0.0f;
for (uint d = lane; d < DQK; d += 32) {
    uint at = row * DQK + d, of = chunk * DQK + d;
    float added = left * (static_cast<float>(dk_adds[at]) + dn_adds[of]);
    dq[at] = static_cast<T>(static_cast<float>(dq_inside[at]) + static_cast<float>(dq_before[at]) + dcarry[row] * n_states[of]);
    dk[at] = static_cast<T>(static_cast<float>(dk_inside[at]) + added);
    along += added * static_cast<float>(k[at]);
}
for (uint d = lane; d < DV; d += 32) {
    uint at = row * DV + d;
    dv[at] = static_cast<T>(static_cast<float>(dv_inside[at]) + left * static_cast<float>(dv_adds[at]));
}
along = simd_sum(along);
if (lane == 0) written[row] = along;
