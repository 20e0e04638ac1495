uint lane = thread_index_in_simdgroup;
uint row = thread_position_in_grid.x / 32;
uint NH = h_shape[1], S = h_shape[2], DV = h_shape[3];
uint s = row % S, head = row / S % NH, batch = row / S / NH;
uint from = row * DV, to = ((batch * S + s) * NH + head) * DV;
float mean = row_mean(h + from, DV, lane), scale = row_scale(h + from, DV, lane, mean, eps[0]);
float sum_dz = 0.0f, sum_dzz = 0.0f;
for (uint d0 = lane; d0 < DV; d0 += 128) {
    float of_gate[4];
    float of_weight[4];
    float of_bias[4];
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j;
        bool here = d < DV;
        float z = here ? (static_cast<float>(h[from + d]) - mean) * scale : 0.0f;
        float weight = here ? static_cast<float>(w[head * DV + d]) : 0.0f;
        float gate = here ? sigmoid(static_cast<float>(o[to + d])) : 0.0f;
        float delta = here ? static_cast<float>(dy[to + d]) : 0.0f;
        float x = z * weight;
        if (BIAS) x += here ? static_cast<float>(b[head * DV + d]) : 0.0f;
        of_gate[j] = delta * x * gate * (1.0f - gate);
        of_weight[j] = delta * gate * z;
        of_bias[j] = delta * gate;
        sum_dz += delta * gate * weight;
        sum_dzz += delta * gate * weight * z;
    }
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j;
        if (d < DV) {
            d_o[to + d] = static_cast<T>(of_gate[j]);
            dw[to + d] = of_weight[j];
            if (BIAS || to + d == 0) db[to + d] = of_bias[j]; // without an offset, one number that nobody reads
        }
    }
}

float width = static_cast<float>(DV), mean_dz = simd_sum(sum_dz) / width, mean_dzz = simd_sum(sum_dzz) / width;
for (uint d0 = lane; d0 < DV; d0 += 128) {
    float of_h[4];
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j;
        bool here = d < DV;
        float z = here ? (static_cast<float>(h[from + d]) - mean) * scale : 0.0f;
        float gate = here ? sigmoid(static_cast<float>(o[to + d])) : 0.0f;
        float dz = here ? static_cast<float>(dy[to + d]) * gate * static_cast<float>(w[head * DV + d]) : 0.0f;
        of_h[j] = scale * (dz - mean_dz - z * mean_dzz);
    }
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j;
        if (d < DV) dh[from + d] = of_h[j];
    }
}
