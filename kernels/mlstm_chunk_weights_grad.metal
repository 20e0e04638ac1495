uint t = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint head = threadgroup_position_in_grid.z, chunk = threadgroup_position_in_grid.y;
uint S = v_shape[1], DV = v_shape[2], NC = (S + 63) / 64;
uint from = chunk * 64, length = metal::min(64u, S - from), first = head * S + from;
threadgroup float stage[64 * 76];
threadgroup float forget[64];
threadgroup float enter[64];
threadgroup float columns[8 * 64];
auto left = stage + 0, right = stage + 64 * 40;
if (t < 64) {
    forget[t] = t < length ? log_f[first + t] : 0.0f;
    enter[t] = t < length ? i[first + t] : -1e9f;
}

// what each token's read-out wants of each value
simdgroup_float8x8 acc[8];
clear_tile(acc);
for (uint d0 = 0; d0 < DV; d0 += 32) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = t; e < 2048; e += 256) {
        uint r = e / 32, d = d0 + e % 32, at = (first + r) * DV + d, c = e % 32;
        bool inside = r < length && d < DV;
        left[r * 40 + c] = inside ? dnum[at] : 0.0f;
        right[r * 36 + c] = inside ? static_cast<float>(v[at]) : 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint d = 0; d < 32 && tile_col(group) <= tile_row(group) + 8; d += 8)
        multiply_tile<false, true>(acc, left, right, group, d);
}
store_tile(acc, stage + 0, group);

// times the decay: the gradient of the products; times the weights: that of the exponents
float e0 = -1e9f, e1 = -1e9f, column0 = 0.0f, column1 = 0.0f;
for (uint row = 0; row < 64; row++) {
    e0 = row == lane ? enter[lane] : e0 + forget[row];
    e1 = row == lane + 32 ? enter[lane + 32] : e1 + forget[row];
    if (row / 8 != group) continue;
    bool inside = row < length;
    float m1 = inside ? m[first + row] : 0.0f, extra = inside ? dden[first + row] : 0.0f;
    float a0 = stage[row * 72 + lane] + extra, a1 = stage[row * 72 + lane + 32] + extra;
    uint to = ((head * NC + chunk) * 64 + row) * 64 + lane;
    dweights[to] = inside && lane <= row ? scalars[0] * metal::exp(e0 - m1) * a0 : 0.0f;
    dweights[to + 32] = inside && lane + 32 <= row ? scalars[0] * metal::exp(e1 - m1) * a1 : 0.0f;
    float g0 = lane <= row ? a0 * weights[to] : 0.0f, g1 = lane + 32 <= row ? a1 * weights[to + 32] : 0.0f;
    stage[row * 72 + lane] = g0;
    stage[row * 72 + lane + 32] = g1;
    column0 += g0;
    column1 += g1;
}
columns[group * 64 + lane] = column0;
columns[group * 64 + lane + 32] = column1;
threadgroup_barrier(mem_flags::mem_threadgroup);

// an input gate is in its column's exponents, a forget gate in those that begin before it and end later
if (t < 64) {
    float sum = 0.0f;
    for (uint j = 0; j < 64; j++) {
        float g = stage[t * 72 + j];
        stage[t * 72 + j] = sum;
        sum += g;
    }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (t < length) {
    float enters = 0.0f, passes = 0.0f;
    for (uint j = 0; j < 8; j++) enters += columns[j * 64 + t];
    for (uint row = t; row < length; row++) passes += stage[row * 72 + t];
    di[first + t] = enters;
    dlog_f[first + t] = passes;
}
