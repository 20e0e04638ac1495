uint lane = thread_index_in_simdgroup, first = thread_position_in_grid.x / 32 * 4;
uint S = x_shape[1], D = x_shape[2], N = x_shape[0] * S, NH = Wi_shape[0];
for (uint g0 = 0; g0 < 2 * NH; g0 += 8) {
    float sums[32];
    for (uint j = 0; j < 32; j++) sums[j] = 0.0f;
    for (uint d = lane; d < D; d += 32) {
        float value[4];
        float weight[8];
        for (uint r = 0; r < 4; r++) value[r] = first + r < N ? static_cast<float>(x[(first + r) * D + d]) : 0.0f;
        for (uint j = 0; j < 8; j++) {
            uint g = g0 + j;
            weight[j] = g < NH ? Wi[g * D + d] : g < 2 * NH ? Wf[(g - NH) * D + d] : 0.0f;
        }
        for (uint j = 0; j < 32; j++) sums[j] += weight[j / 4] * value[j % 4];
    }
    for (uint j = 0; j < 32; j++) {
        uint g = g0 + j / 4, token = first + j % 4;
        uint to = (token / S * NH + g % NH) * S + token % S;
        float z = simd_sum(sums[j]);
        if (lane == j && g < 2 * NH && token < N) {
            z += g < NH ? bi[g] : bf[g - NH];
            if (BOUNDED) z = cap[0] * metal::tanh(z / cap[0]);
            if (g < NH) i[to] = z;
            else f[to] = z;
        }
    }
}
