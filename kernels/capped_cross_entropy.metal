uint own = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint row = threadgroup_position_in_grid.x, V = x_shape[1];
uint from = row * V;
threadgroup float tops[8];
threadgroup float sums[8];
float top = -1e30f, sum = 0.0f;
for (uint j0 = own; j0 < V; j0 += 2048) {
    float z[8];
    float highest = top;
    for (uint k = 0; k < 8; k++) z[k] = j0 + 256 * k < V ? static_cast<float>(x[from + j0 + 256 * k]) : -1e30f;
    for (uint k = 0; k < 8; k++) {
        if (BOUNDED && j0 + 256 * k < V) z[k] = cap[0] * metal::tanh(z[k] / cap[0]);
        highest = metal::max(highest, z[k]);
    }
    sum *= metal::exp(top - highest);
    for (uint k = 0; k < 8; k++) sum += metal::exp(z[k] - highest);
    top = highest;
}
float highest = simd_max(top);
sum = simd_sum(sum * metal::exp(top - highest));
if (lane == 0) {
    tops[group] = highest;
    sums[group] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (own == 0) {
    for (uint k = 1; k < 8; k++) highest = metal::max(highest, tops[k]);
    sum = 0.0f;
    for (uint k = 0; k < 8; k++) sum += sums[k] * metal::exp(tops[k] - highest);
    float z = static_cast<float>(x[from + static_cast<uint>(y[row])]), log_sum = highest + metal::log(sum);
    if (BOUNDED) z = cap[0] * metal::tanh(z / cap[0]);
    logsumexp[row] = log_sum;
    loss[row] = log_sum - z;
}
