uint lane = thread_index_in_simdgroup;
uint row = thread_position_in_grid.x / 32;
uint NH = h_shape[1], S = h_shape[2], DV = h_shape[3];
uint s = row % S, head = row / S % NH, batch = row / S / NH;
uint from = row * DV, to = ((batch * S + s) * NH + head) * DV;
float mean = row_mean(h + from, DV, lane), scale = row_scale(h + from, DV, lane, mean, eps[0]);
float sum_dz = 0.0f, sum_dzz = 0.0f;
for (uint d = lane; d < DV; d += 32) {
    float z = (static_cast<float>(h[from + d]) - mean) * scale;
    float weight = static_cast<float>(w[head * DV + d]);
    float gate = sigmoid(static_cast<float>(o[to + d]));
    float delta = static_cast<float>(dy[to + d]);
    float x = z * weight;
    if (BIAS) x += static_cast<float>(b[head * DV + d]);
    d_o[to + d] = static_cast<T>(delta * x * gate * (1.0f - gate));
    dw[to + d] = delta * gate * z;
    if (BIAS || to + d == 0) db[to + d] = delta * gate; // without an offset, one number that nobody reads
    sum_dz += delta * gate * weight;
    sum_dzz += delta * gate * weight * z;
}
float width = static_cast<float>(DV), mean_dz = simd_sum(sum_dz) / width, mean_dzz = simd_sum(sum_dzz) / width;
for (uint d = lane; d < DV; d += 32) {
    float z = (static_cast<float>(h[from + d]) - mean) * scale;
    float gate = sigmoid(static_cast<float>(o[to + d]));
    float dz = static_cast<float>(dy[to + d]) * gate * static_cast<float>(w[head * DV + d]);
    dh[from + d] = scale * (dz - mean_dz - z * mean_dzz);
}
