uint t = thread_index_in_threadgroup, lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
uint head = threadgroup_position_in_grid.z;
uint row0 = threadgroup_position_in_grid.y * 64, col0 = threadgroup_position_in_grid.x * 64;
uint S = k_shape[1], DQK = k_shape[2], DV = v_shape[2], NC = (S + 63) / 64;
threadgroup float stage[64 * 72];
threadgroup float forget[64];
threadgroup float a[64];
auto keys = stage + 0, values = stage + 32 * 72;

simdgroup_float8x8 acc[8]; // this SIMD group's part of the tile of C
for (uint e = t; e < 4096; e += 256) {
    uint r = row0 + e / 64, c = col0 + e % 64;
    stage[e / 64 * 72 + e % 64] = r < DQK && c < DV ? C[(head * DQK + r) * DV + c] : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
load_tile(acc, stage + 0, group);
bool mine = t < 64 && row0 + t < DQK;  // this thread also holds one number of n
float total = mine ? n[head * DQK + row0 + t] : 0.0f, m0 = m[head];

for (uint chunk = 0; chunk <= NC; chunk++) {
    // the state before this chunk, or after the last one
    uint at = head * (NC + 1) + chunk;
    store_tile(acc, stage + 0, group);
    for (uint e = t; e < 4096; e += 256) {
        uint r = row0 + e / 64, c = col0 + e % 64;
        if (r < DQK && c < DV) states[(at * DQK + r) * DV + c] = stage[e / 64 * 72 + e % 64];
    }
    if (mine && col0 == 0) n_states[at * DQK + row0 + t] = total;
    if (t == 0 && row0 == 0 && col0 == 0) m_states[at] = m0;
    if (chunk == NC) break;

    // the exponent with which each token survives the chunk: the gates behind it, added up, and its own
    uint from = chunk * 64, length = metal::min(64u, S - from), first = head * S + from;
    if (group < 2) {
        float sum = t < length ? log_f[first + t] : 0.0f;
        for (uint s = 1; s < 32; s *= 2) {
            float more = simd_shuffle(sum, static_cast<ushort>((lane + s) % 32));
            if (lane + s < 32) sum += more;
        }
        forget[t] = sum; // from this token to the end of its half
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float a0 = lane < length ? i[first + lane] + forget[32] : -1e9f;
    float a1 = lane + 32 < length ? i[first + lane + 32] : -1e9f;
    if (lane < 31) {
        a0 += forget[lane + 1];
        a1 += forget[lane + 33];
    }
    float g = forget[0] + forget[32], m1 = metal::max(simd_max(metal::max(a0, a1)), g + m0);
    float F = metal::exp(g + m0 - m1);
    if (group == 0) {
        a[lane] = a0;
        a[lane + 32] = a1;
    }

    // forget, then add the products of keys and values, 32 tokens at a time
    scale_tile(acc, F);
    total *= F;
    for (uint l0 = 0; l0 < length; l0 += 32) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint e = t; e < 2048; e += 256) {
            uint l = l0 + e / 64, c = e % 64, token = first + l, to = e / 64 * 72 + c;
            float key = 0.0f, value = 0.0f;
            if (l < length && row0 + c < DQK) key = static_cast<float>(k[token * DQK + row0 + c]);
            if (l < length && col0 + c < DV) value = static_cast<float>(v[token * DV + col0 + c]);
            keys[to] = metal::exp(a[l] - m1) * key;
            values[to] = value;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint l = 0; l < 32; l += 8) multiply_tile<true, false>(acc, keys, values, group, l);
        if (mine)
            for (uint l = 0; l < 32; l++) total += keys[l * 72 + t];
    }
    m0 = m1;
}
