uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint L = k_shape[3], DQK = k_shape[4], tiles = (DQK + 31) / 32;
uint chunk = threadgroup_position_in_grid.x / tiles, d = threadgroup_position_in_grid.x % tiles * 32 + lane;
threadgroup float parts[8 * 32];
float last = top[chunk * L + L - 1], sum = 0.0f;
for (uint t0 = group * 4; t0 < L; t0 += 32) {
    float value[4];
    for (uint j = 0; j < 4; j++) {
        uint token = chunk * L + t0 + j;
        value[j] = d < DQK && t0 + j < L ? static_cast<float>(k[token * DQK + d]) * metal::exp(e[token] - last) : 0.0f;
    }
    for (uint j = 0; j < 4; j++) {
        uint token = chunk * L + t0 + j;
        if (d < DQK && t0 + j < L) adds[token * DQK + d] = value[j];
        sum += value[j];
    }
}
parts[group * 32 + lane] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (group == 0 && d < DQK) {
    for (uint j = 1; j < 8; j++) sum += parts[j * 32 + lane];
    n_adds[chunk * DQK + d] = sum;
}
