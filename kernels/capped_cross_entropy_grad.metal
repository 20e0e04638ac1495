uint own = thread_position_in_threadgroup.x, row = threadgroup_position_in_grid.y, V = x_shape[1];
uint from = row * V;
float slope = dloss[row], log_sum = logsumexp[row];
uint label = static_cast<uint>(y[row]), j0 = threadgroup_position_in_grid.x * 2048 + own;
float z[8];
for (uint k = 0; k < 8; k++) z[k] = j0 + 256 * k < V ? static_cast<float>(x[from + j0 + 256 * k]) : 0.0f;
for (uint k = 0; k < 8; k++) {
    uint j = j0 + 256 * k;
    float share = 0.0f;
    if (BOUNDED) {
        share = metal::tanh(z[k] / cap[0]);
        z[k] = cap[0] * share;
    }
    float grad = slope * (metal::exp(z[k] - log_sum) - (j == label ? 1.0f : 0.0f)) * (1.0f - share * share);
    if (j < V) dx[from + j] = static_cast<T>(grad);
}
