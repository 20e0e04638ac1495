uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint L = dweights_shape[4], blocks = (L + 31) / 32;
uint chunk = threadgroup_position_in_grid.x / blocks, block = threadgroup_position_in_grid.x % blocks;
threadgroup float parts[8 * 32];
float total[4];
for (uint j = 0; j < 4; j++) total[j] = 0.0f;
for (uint s0 = 0; s0 < L; s0 += 32) {
    uint s = s0 + lane;
    float column = 0.0f;
    float x[4];
    for (uint j = 0; j < 4; j++) {
        uint t = block * 32 + group * 4 + j, row = chunk * L + t, at = row * L + s;
        x[j] = 0.0f;
        if (t < L && s <= t) {
            float grad = static_cast<float>(dweights[at]) + dsums[row], z = grad * static_cast<float>(weights[at]);
            x[j] = scale[0] * grad * metal::exp(b[row] - m[row] + e[chunk * L + s]);
            total[j] += z;
            column += z;
        }
    }
    for (uint j = 0; j < 4; j++) {
        uint t = block * 32 + group * 4 + j, at = (chunk * L + t) * L + s;
        if (t < L && s < L) dscores[at] = static_cast<T>(x[j]);
    }
    parts[group * 32 + lane] = column;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint j = 1; j < 8; j++) column += parts[j * 32 + lane];
    if (group == 0 && s < L) columns[threadgroup_position_in_grid.x * L + s] = column;
    threadgroup_barrier(mem_flags::mem_threadgroup);
}
for (uint j = 0; j < 4; j++) {
    uint t = block * 32 + group * 4 + j;
    float sum = simd_sum(total[j]);
    if (lane == 0 && t < L) rows[chunk * L + t] = sum;
}
