uint own = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint block = threadgroup_position_in_grid.x, N = x_shape[0];
threadgroup float parts[8];
float sum = 0.0f;
for (uint row = block; row * 1024 < N; row += 256) {
    uint from = row * 1024 + own;
    float value[4];
    for (uint j = 0; j < 4; j++) value[j] = from + 256 * j < N ? static_cast<float>(x[from + 256 * j]) : 0.0f;
    for (uint j = 0; j < 4; j++) sum += value[j] * value[j];
}
sum = simd_sum(sum);
if (lane == 0) parts[group] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (own == 0) {
    sum = sums[block];
    for (uint j = 0; j < 8; j++) sum += parts[j];
    out[block] = sum;
}
