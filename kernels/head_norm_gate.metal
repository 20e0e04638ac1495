uint lane = thread_index_in_simdgroup, row = thread_position_in_grid.x / 32;
uint NH = h_shape[1], S = h_shape[2], DV = h_shape[3];
uint s = row % S, head = row / S % NH, batch = row / S / NH;
uint from = row * DV, to = ((batch * S + s) * NH + head) * DV;
float width = static_cast<float>(DV), sum = 0.0f, squares = 0.0f;
float z[PER];
float gate[PER];
float weight[PER];
float bias[PER];
for (uint j = 0; j < PER; j++) {
    uint d = lane + 32 * j;
    z[j] = d < DV ? static_cast<float>(h[from + d]) : 0.0f;
    gate[j] = d < DV ? static_cast<float>(o[to + d]) : 0.0f;
    weight[j] = d < DV ? static_cast<float>(w[head * DV + d]) : 0.0f;
    bias[j] = 0.0f;
    if (BIAS) bias[j] = d < DV ? static_cast<float>(b[head * DV + d]) : 0.0f;
    sum += z[j];
}
float mean = simd_sum(sum) / width;
for (uint j = 0; j < PER; j++) {
    z[j] = lane + 32 * j < DV ? z[j] - mean : 0.0f;
    squares += z[j] * z[j];
}
float scale = metal::rsqrt(simd_sum(squares) / width + eps[0]);
for (uint j = 0; j < PER; j++) {
    uint d = lane + 32 * j;
    float x = z[j] * scale * weight[j] + bias[j];
    if (d < DV) y[to + d] = static_cast<T>(x * sigmoid(gate[j]));
}
