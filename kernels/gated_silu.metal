uint base = threadgroup_position_in_grid.x * 1024 + thread_position_in_threadgroup.x;
uint size = gate_shape[0] * gate_shape[1] * gate_shape[2];
for (uint j = 0; j < 4; j++) {
    uint at = base + 256 * j;
    if (at < size) {
        float g = static_cast<float>(gate[at]);
        y[at] = static_cast<T>(g * sigmoid(g) * static_cast<float>(up[at]));
    }
}
