uint own = thread_position_in_threadgroup.x, d = thread_position_in_grid.x, chunk = threadgroup_position_in_grid.y;
uint S = x_shape[1], D = x_shape[2], N = x_shape[0] * S, NH = Wi_shape[0], first = chunk * 64;
threadgroup float delta[64 * GATES];
for (uint e = own; e < 64 * GATES; e += 256) {
    uint g = e / 64, token = first + e % 64;
    float z = 0.0f;
    if (token < N) {
        uint at = (token / S * NH + g % NH) * S + token % S;
        float share = BOUNDED ? (g < NH ? i[at] : f[at]) / cap[0] : 0.0f;
        z = (g < NH ? di[at] : df[at]) * (1.0f - share * share);
    }
    delta[e] = z;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float weight[GATES];
float total[GATES];
for (uint g = 0; g < GATES; g++) {
    weight[g] = d < D ? (g < NH ? Wi[g * D + d] : Wf[(g - NH) * D + d]) : 0.0f;
    total[g] = 0.0f;
}
for (uint t0 = 0; t0 < 64; t0 += 4) {
    float value[4];
    for (uint j = 0; j < 4; j++) {
        uint at = (first + t0 + j) * D + d;
        value[j] = d < D && first + t0 + j < N ? static_cast<float>(x[at]) : 0.0f;
    }
    for (uint j = 0; j < 4; j++) {
        uint at = (first + t0 + j) * D + d;
        float sum = 0.0f;
        for (uint g = 0; g < GATES; g++) {
            sum += delta[g * 64 + t0 + j] * weight[g];
            total[g] += delta[g * 64 + t0 + j] * value[j];
        }
        if (d < D && first + t0 + j < N) dx[at] = static_cast<T>(sum);
    }
}
for (uint g = 0; g < GATES; g++)
    if (d < D) dW[(chunk * GATES + g) * D + d] = total[g];
if (d < GATES) {
    float sum = 0.0f;
    for (uint t = 0; t < 64; t++) sum += delta[d * 64 + t];
    db[chunk * GATES + d] = sum;
}
