uint lane = thread_index_in_simdgroup;
uint row = thread_position_in_grid.x / 32;
uint NH = h_shape[1], S = h_shape[2], DV = h_shape[3];
uint s = row % S, head = row / S % NH, batch = row / S / NH;
uint from = row * DV, to = ((batch * S + s) * NH + head) * DV;
float mean = row_mean(h + from, DV, lane), scale = row_scale(h + from, DV, lane, mean, eps[0]);
for (uint d0 = lane; d0 < DV; d0 += 128) {
    float gated[4];
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j;
        float x = 0.0f;
        if (d < DV) {
            x = (static_cast<float>(h[from + d]) - mean) * scale * static_cast<float>(w[head * DV + d]);
            if (BIAS) x += static_cast<float>(b[head * DV + d]);
            x *= sigmoid(static_cast<float>(o[to + d]));
        }
        gated[j] = x;
    }
    for (uint j = 0; j < 4; j++) {
        uint d = d0 + 32 * j;
        if (d < DV) y[to + d] = static_cast<T>(gated[j]);
    }
}
