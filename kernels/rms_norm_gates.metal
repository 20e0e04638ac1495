uint own = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint G = W_shape[0], D = W_shape[1], row = threadgroup_position_in_grid.x / G, g = threadgroup_position_in_grid.x % G;
uint from = row * D;
threadgroup float parts[8];
threadgroup float sums[8];
float squares = 0.0f, sum = 0.0f;
for (uint d = own; d < D; d += 256) {
    float value = static_cast<float>(x[from + d]);
    squares += value * value;
}
squares = simd_sum(squares);
if (lane == 0) parts[group] = squares;
threadgroup_barrier(mem_flags::mem_threadgroup);
squares = 0.0f;
for (uint j = 0; j < 8; j++) squares += parts[j];
float scale = metal::rsqrt(squares / static_cast<float>(D) + scalars[0]);
for (uint d = own; d < D; d += 256) {
    T normed = static_cast<T>(static_cast<float>(x[from + d]) * scale);
    T weighed = static_cast<T>(static_cast<float>(normed) * static_cast<float>(w[d]));
    sum += static_cast<float>(weighed) * W[g * D + d];
}
for (uint d = g * D / G + own; d < (g + 1) * D / G; d += 256) {
    T normed = static_cast<T>(static_cast<float>(x[from + d]) * scale);
    z[from + d] = static_cast<T>(static_cast<float>(normed) * static_cast<float>(w[d]));
}
sum = simd_sum(sum);
if (lane == 0) sums[group] = sum;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (own == 0) {
    sum = b[g];
    for (uint j = 0; j < 8; j++) sum += sums[j];
    if (BOUNDED) sum = scalars[1] * metal::tanh(sum / scalars[1]);
    if (g < G / 2) i[row * (G / 2) + g] = sum;
    else f[row * (G / 2) + g - G / 2] = sum;
}
