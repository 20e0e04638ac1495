uint base = threadgroup_position_in_grid.x * 1024 + thread_position_in_threadgroup.x;
uint N = g_shape[0];
float rate = settings[0], step = settings[1], correction = settings[2], b1 = settings[3], new1 = settings[4];
float b2 = settings[5], new2 = settings[6], eps = settings[7], decay = settings[8];
float factor = settings[9] / (metal::sqrt(settings[10]) + 1e-6f);
if (factor > 1.0f) factor = 1.0f; // not NaN
float grad[4];
float weight[4];
float mean[4];
float square[4];
for (uint j = 0; j < 4; j++) {
    uint at = base + 256 * j;
    grad[j] = at < N ? factor * static_cast<float>(g[at]) : 0.0f;
    weight[j] = at < N ? static_cast<float>(w[at]) : 0.0f;
    mean[j] = at < N ? static_cast<float>(m[at]) : 0.0f;
    square[j] = at < N ? static_cast<float>(v[at]) : 0.0f;
}
for (uint j = 0; j < 4; j++) {
    uint at = base + 256 * j;
    float first = b1 * mean[j] + new1 * grad[j], second = b2 * square[j] + new2 * grad[j] * grad[j];
    float next = weight[j] * (1.0f - rate * decay) - step * first / (metal::sqrt(second) * correction + eps);
    if (at < N) w_out[at] = static_cast<T>(next);
    if (at < N) m_out[at] = static_cast<M>(first);
    if (at < N) v_out[at] = static_cast<M>(second);
}
