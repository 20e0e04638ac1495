uint own = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint D = w_shape[0];
uint from = threadgroup_position_in_grid.x * D;
threadgroup float parts[8];
float squares = 0.0f;
for (uint d = own; d < D; d += 256) {
    T sum = static_cast<T>(static_cast<float>(x[from + d]) + static_cast<float>(y[from + d]));
    squares += static_cast<float>(sum) * static_cast<float>(sum);
}
squares = simd_sum(squares);
if (lane == 0) parts[group] = squares;
threadgroup_barrier(mem_flags::mem_threadgroup);
squares = 0.0f;
for (uint j = 0; j < 8; j++) squares += parts[j];
float scale = metal::rsqrt(squares / static_cast<float>(D) + eps[0]);
for (uint d0 = own; d0 < D; d0 += 2048) {
    float a[8];
    float b[8];
    float weight[8];
    for (uint j = 0; j < 8; j++) {
        uint d = d0 + 256 * j;
        a[j] = d < D ? static_cast<float>(x[from + d]) : 0.0f;
        b[j] = d < D ? static_cast<float>(y[from + d]) : 0.0f;
        weight[j] = d < D ? static_cast<float>(w[d]) : 0.0f;
    }
    for (uint j = 0; j < 8; j++) {
        uint d = d0 + 256 * j;
        T sum = static_cast<T>(a[j] + b[j]), normed = static_cast<T>(static_cast<float>(sum) * scale);
        if (d < D) s[from + d] = sum;
        if (d < D) z[from + d] = static_cast<T>(static_cast<float>(normed) * weight[j]);
    }
}
