uint t = thread_index_in_threadgroup, group = simdgroup_index_in_threadgroup;
uint head = threadgroup_position_in_grid.z;
uint row0 = threadgroup_position_in_grid.y * 64, col0 = threadgroup_position_in_grid.x * 64;
uint S = q_shape[1], DQK = q_shape[2], DV = dnum_shape[2], NC = (S + 63) / 64;
uint tiles_across = (DV + 63) / 64, num_tiles = (DQK + 63) / 64 * tiles_across;
uint tile = row0 / 64 * tiles_across + col0 / 64;
threadgroup float stage[64 * 72];
threadgroup float sums[8];
auto queries = stage + 0, outputs = stage + 32 * 72;
simdgroup_float8x8 acc[8];
for (uint e = t; e < 4096; e += 256) {
    uint r = row0 + e / 64, c = col0 + e % 64;
    stage[e / 64 * 72 + e % 64] = r < DQK && c < DV ? dC[(head * DQK + r) * DV + c] : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
load_tile(acc, stage + 0, group);
bool mine = t < 64 && row0 + t < DQK;
float total = mine ? dn[head * DQK + row0 + t] : 0.0f;

for (uint chunk = NC; ; chunk--) {
    // the gradient of the state before this chunk, or after the last one
    uint at = head * (NC + 1) + chunk;
    store_tile(acc, stage + 0, group);
    float product = 0.0f; // with the state before the chunk that comes next
    for (uint e = t; e < 4096; e += 256) {
        uint r = row0 + e / 64, c = col0 + e % 64;
        if (r < DQK && c < DV) {
            float x = stage[e / 64 * 72 + e % 64];
            dstates[(at * DQK + r) * DV + c] = x;
            if (chunk > 0) product += x * states[((at - 1) * DQK + r) * DV + c];
        }
    }
    if (mine && col0 == 0) {
        dn_states[at * DQK + row0 + t] = total;
        if (chunk > 0) product += total * n_states[(at - 1) * DQK + row0 + t];
    }
    if (chunk == 0) break;
    product = simd_sum(product);
    if (thread_index_in_simdgroup == 0) sums[group] = product;

    // forget as the chunk did, then add what its tokens read
    uint from = (chunk - 1) * 64, length = metal::min(64u, S - from), lane = thread_index_in_simdgroup;
    float g = lane < length ? log_f[head * S + from + lane] : 0.0f;
    if (lane + 32 < length) g += log_f[head * S + from + lane + 32];
    float F = metal::exp(simd_sum(g) + m_states[at - 1] - m_states[at]);
    scale_tile(acc, F);
    total *= F;
    for (uint l0 = 0; l0 < length; l0 += 32) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t == 0 && l0 == 0) {
            float sum = 0.0f;
            for (uint j = 0; j < 8; j++) sum += sums[j];
            dg[(head * NC + chunk - 1) * num_tiles + tile] = F * sum;
        }
        for (uint e = t; e < 2048; e += 256) {
            uint l = l0 + e / 64, c = e % 64, token = head * S + from + l, to = e / 64 * 72 + c;
            float query = 0.0f, value = 0.0f;
            if (l < length && row0 + c < DQK) query = static_cast<float>(q[token * DQK + row0 + c]);
            if (l < length && col0 + c < DV) value = dnum[token * DV + col0 + c];
            queries[to] = l < length ? inter_chunk_decay[token] * query : 0.0f;
            outputs[to] = value;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint l = 0; l < 32; l += 8) multiply_tile<true, false>(acc, queries, outputs, group, l);
        for (uint l = 0; l < 32 && l0 + l < length && mine; l++)
            total += queries[l * 72 + t] * dden[head * S + from + l0 + l];
    }
}
