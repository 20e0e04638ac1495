uint lane = thread_index_in_simdgroup;
uint row = thread_position_in_grid.x / 32;
uint NH = h_shape[1], S = h_shape[2], DV = h_shape[3];
uint s = row % S, head = row / S % NH, batch = row / S / NH;
uint from = row * DV, to = ((batch * S + s) * NH + head) * DV;

float sum = 0.0f;
for (uint d = lane; d < DV; d += 32) sum += static_cast<float>(h[from + d]);
float width = static_cast<float>(DV), mean = simd_sum(sum) / width;
float squares = 0.0f;
for (uint d = lane; d < DV; d += 32) {
    float x = static_cast<float>(h[from + d]) - mean;
    squares += x * x;
}
float scale = metal::rsqrt(simd_sum(squares) / width + eps[0]);

for (uint d = lane; d < DV; d += 32) {
    float z = (static_cast<float>(h[from + d]) - mean) * scale;
    float gate = 1.0f / (1.0f + metal::exp(-static_cast<float>(o[to + d])));
    float x = z * static_cast<float>(w[head * DV + d]);
    if (BIAS) x += static_cast<float>(b[head * DV + d]);
    y[to + d] = static_cast<T>(gate * x);
}
