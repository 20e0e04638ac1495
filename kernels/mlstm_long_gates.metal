uint lane = thread_index_in_simdgroup, chunk = thread_position_in_grid.x / 32, L = i_shape[3];
threadgroup float forget[32];
threadgroup float input[32];
float sum = 0.0f, highest = -1e30f;
for (uint t0 = 0; t0 < L; t0 += 32) {
    uint token = chunk * L + t0 + lane;
    bool inside = t0 + lane < L;
    float own = inside ? i[token] : -1e9f, b_lane = 0.0f, top_lane = 0.0f;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    forget[lane] = inside ? metal::max(log_sigmoid(f[token]), -100.0f) : 0.0f;
    input[lane] = own;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint j = 0; j < 32; j++) {
        sum += forget[j];
        highest = metal::max(highest, input[j] - sum);
        b_lane = lane == j ? sum : b_lane;
        top_lane = lane == j ? highest : top_lane;
    }
    if (inside) {
        b[token] = b_lane;
        e[token] = own - b_lane;
        top[token] = top_lane;
    }
}
if (lane == 0) {
    log_decay[chunk] = sum;
    log_adds[chunk] = sum + highest;
}
