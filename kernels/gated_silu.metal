uint base = threadgroup_position_in_grid.x * 1024 + thread_position_in_threadgroup.x;
uint size = gate_shape[0] * gate_shape[1] * gate_shape[2];
float g[4];
float u[4];
for (uint j = 0; j < 4; j++) {
    uint at = base + 256 * j;
    g[j] = at < size ? static_cast<float>(gate[at]) : 0.0f;
    u[j] = at < size ? static_cast<float>(up[at]) : 0.0f;
}
for (uint j = 0; j < 4; j++) {
    uint at = base + 256 * j;
    if (at < size) y[at] = static_cast<T>(g[j] * sigmoid(g[j]) * u[j]);
}
