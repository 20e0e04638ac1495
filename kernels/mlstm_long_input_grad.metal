uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.x / 32;
uint L = k_shape[3], DQK = k_shape[4], DV = dv_inside_shape[4], chunk = row / L;
float left = metal::exp(e[row] - top[chunk * L + L - 1]), along = 0.0f;
float carry = dcarry[row];
for (uint d0 = lane; d0 < DQK; d0 += 128) {
    float query[4];
    float key[4];
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j, at = row * DQK + d, of = chunk * DQK + d;
        bool here = d < DQK;
        float added = here ? left * (static_cast<float>(dk_adds[at]) + dn_adds[of]) : 0.0f;
        query[j] = here ? static_cast<float>(dq_inside[at]) + static_cast<float>(dq_before[at]) + carry * n_states[of] : 0.0f;
        key[j] = here ? static_cast<float>(dk_inside[at]) + added : 0.0f;
        along += here ? added * static_cast<float>(k[at]) : 0.0f;
    }
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j, at = row * DQK + d;
        if (d < DQK) dq[at] = static_cast<T>(query[j]);
        if (d < DQK) dk[at] = static_cast<T>(key[j]);
    }
}
for (uint d0 = lane; d0 < DV; d0 += 128) {
    float value[4];
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j, at = row * DV + d;
        value[j] = d < DV ? static_cast<float>(dv_inside[at]) + left * static_cast<float>(dv_adds[at]) : 0.0f;
    }
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j;
        if (d < DV) dv[row * DV + d] = static_cast<T>(value[j]);
    }
}
along = simd_sum(along);
if (lane == 0) {
    written[row] = along;
    reads[row] = top[row] > m_states[chunk] ? carried[row] : db[row] - rows[row]; // what the state's stabiliser wants
}
