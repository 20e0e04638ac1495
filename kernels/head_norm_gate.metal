uint lane = thread_index_in_simdgroup;
uint row = thread_position_in_grid.x / 32;
uint NH = h_shape[1], S = h_shape[2], DV = h_shape[3];
uint s = row % S, head = row / S % NH, batch = row / S / NH;
uint from = row * DV, to = ((batch * S + s) * NH + head) * DV;
float mean = row_mean(h + from, DV, lane), scale = row_scale(h + from, DV, lane, mean, eps[0]);
for (uint d = lane; d < DV; d += 32) {
    float z = (static_cast<float>(h[from + d]) - mean) * scale;
    float gate = sigmoid(static_cast<float>(o[to + d]));
    float x = z * static_cast<float>(w[head * DV + d]);
    if (BIAS) x += static_cast<float>(b[head * DV + d]);
    y[to + d] = static_cast<T>(gate * x);
}
