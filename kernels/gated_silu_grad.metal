uint base = threadgroup_position_in_grid.x * 1024 + thread_position_in_threadgroup.x;
uint size = gate_shape[0] * gate_shape[1] * gate_shape[2];
float g[4];
float u[4];
float delta[4];
for (uint j = 0; j < 4; j++) {
    uint at = base + 256 * j;
    g[j] = at < size ? static_cast<float>(gate[at]) : 0.0f;
    u[j] = at < size ? static_cast<float>(up[at]) : 0.0f;
    delta[j] = at < size ? static_cast<float>(dy[at]) : 0.0f;
}
for (uint j = 0; j < 4; j++) {
    uint at = base + 256 * j;
    float s = sigmoid(g[j]);
    if (at < size) dgate[at] = static_cast<T>(delta[j] * u[j] * s * (1.0f + g[j] * (1.0f - s)));
    if (at < size) dup[at] = static_cast<T>(delta[j] * g[j] * s);
}
