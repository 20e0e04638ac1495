uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint NH = h_shape[1], S = h_shape[2], DV = h_shape[3], blocks = (S + 31) / 32;
uint block = threadgroup_position_in_grid.x % blocks, row = threadgroup_position_in_grid.x / blocks;
uint head = row % NH, batch = row / NH, end = metal::min(block * 32 + 32, S);
float width = static_cast<float>(DV);
float weight[PER];
float bias[PER];
float of_weight[PER];
float of_bias[PER];
for (uint j = 0; j < PER; j++) {
    uint d = lane + 32 * j;
    weight[j] = d < DV ? static_cast<float>(w[head * DV + d]) : 0.0f;
    bias[j] = 0.0f;
    if (BIAS) bias[j] = d < DV ? static_cast<float>(b[head * DV + d]) : 0.0f;
    of_weight[j] = of_bias[j] = 0.0f;
}

for (uint s = block * 32 + group; s < end; s += 8) {
    uint from = (row * S + s) * DV, to = ((batch * S + s) * NH + head) * DV;
    float z[PER];
    float gate[PER];
    float delta[PER];
    float sum = 0.0f, squares = 0.0f, sum_dz = 0.0f, sum_dzz = 0.0f;
    for (uint j = 0; j < PER; j++) {
        uint d = lane + 32 * j;
        z[j] = d < DV ? static_cast<float>(h[from + d]) : 0.0f;
        gate[j] = d < DV ? static_cast<float>(o[to + d]) : 0.0f;
        delta[j] = d < DV ? static_cast<float>(dy[to + d]) : 0.0f;
        sum += z[j];
    }
    float mean = simd_sum(sum) / width;
    for (uint j = 0; j < PER; j++) {
        z[j] = lane + 32 * j < DV ? z[j] - mean : 0.0f;
        squares += z[j] * z[j];
    }
    float scale = metal::rsqrt(simd_sum(squares) / width + eps[0]);
    for (uint j = 0; j < PER; j++) {
        z[j] *= scale;
        gate[j] = sigmoid(gate[j]);
        delta[j] *= gate[j];
        sum_dz += delta[j] * weight[j];
        sum_dzz += delta[j] * weight[j] * z[j];
    }
    float mean_dz = simd_sum(sum_dz) / width, mean_dzz = simd_sum(sum_dzz) / width;
    for (uint j = 0; j < PER; j++) {
        uint d = lane + 32 * j;
        if (d < DV) d_o[to + d] = static_cast<T>(delta[j] * (z[j] * weight[j] + bias[j]) * (1.0f - gate[j]));
        if (d < DV) dh[from + d] = scale * (delta[j] * weight[j] - mean_dz - z[j] * mean_dzz);
        of_weight[j] += delta[j] * z[j];
        of_bias[j] += delta[j];
    }
}

threadgroup float parts[16 * 32];
for (uint j = 0; j < PER; j++) {
    uint d = lane + 32 * j, at = ((batch * blocks + block) * NH + head) * DV + d;
    parts[group * 32 + lane] = of_weight[j];
    parts[(8 + group) * 32 + lane] = of_bias[j];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum = 0.0f, bias_sum = 0.0f;
    for (uint k = 0; k < 8; k++) {
        sum += parts[k * 32 + lane];
        bias_sum += parts[(8 + k) * 32 + lane];
    }
    if (group == 0 && d < DV) dw[at] = sum;
    if (group == 0 && d < DV && (BIAS || at == 0)) db[at] = bias_sum; // without an offset, one number that nobody reads
    threadgroup_barrier(mem_flags::mem_threadgroup);
}
