uint lane = thread_index_in_simdgroup, at = thread_position_in_grid.x / 32;
uint NC = m_states_shape[2], L = e_shape[3], head = at / NC, chunk = at % NC;

// what the stabiliser of the state behind the chunk wants, from the last chunk backwards
float wanted = dm_last[head];
for (uint c = NC; c > chunk + 1; c--) {
    uint j = head * NC + c - 1;
    bool old_wins = log_decay[j] + m_states[j] >= log_adds[j];
    wanted = read[j] + (old_wins ? wanted - added[j] : handed_on[j]);
}
float m0 = m_states[at], rest = wanted - handed_on[at] - added[at], sums = wanted;
bool old_wins = log_decay[at] + m0 >= log_adds[at];
float source = old_wins ? 0.0f : rest;
if (chunk == 0 && lane == 0) dm_before[head] = read[at] + (old_wins ? wanted - added[at] : handed_on[at]);

// backwards through the chunk, 32 tokens at a time
threadgroup float shared[4 * 32];
for (uint block = (L + 31) / 32; block > 0; block--) {
    uint t = block * 32 - 32 + lane, token = at * L + t;
    bool inside = t < L;
    float own = inside ? columns[token] + written[token] : 0.0f, reads = inside ? db[token] : 0.0f;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    shared[lane] = own;
    shared[32 + lane] = reads;
    shared[64 + lane] = inside && top[token] > m0 ? reads - rows[token] - carried[token] : 0.0f;
    shared[96 + lane] = inside && (t == 0 || e[token] > top[token - (t == 0 ? 0 : 1)]) ? 1.0f : 0.0f;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    float di_lane = 0.0f, df_lane = 0.0f;
    for (uint j = 32; j > 0; j--) {
        source += shared[64 + j - 1];
        float is_source = shared[96 + j - 1], x = shared[j - 1] + is_source * source;
        source -= is_source * source;
        sums += shared[32 + j - 1] - x;
        di_lane = lane == j - 1 ? x : di_lane;
        df_lane = lane == j - 1 ? sums : df_lane;
    }
    if (inside) {
        di[token] = di_lane;
        df[token] = df_lane * sigmoid(-f[token]);
    }
}
