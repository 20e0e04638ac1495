uint element = thread_position_in_grid.x, head = thread_position_in_grid.y, lane = thread_index_in_simdgroup;
uint NC = states_shape[2], DQK = states_shape[3], DV = states_shape[4], size = DQK * DV, groups = (size + 31) / 32;
uint row = element / DV, group = element / 32, of = head * DQK + row, own = head * size + element;
bool inside = element < size, first = inside && element % DV == 0;
float grad = inside ? dC[own] : 0.0f, total = first ? dn[of] : 0.0f, after = m[head];
for (uint end = NC; end > 0; end -= metal::min(end, 4u)) { // four chunks at once, from the last backwards
    float decay[4];
    float gain[4];
    float m0[4];
    float state[4];
    float read[4];
    float n_state[4];
    float n_read[4];
    for (uint j = 0; j < 4; j++) {
        uint at = head * NC + end - 1 - j, there = at * size + element;
        bool here = j < end;
        decay[j] = here ? log_decay[at] : 0.0f;
        gain[j] = here ? log_adds[at] : 0.0f;
        m0[j] = here ? m_states[at] : 0.0f;
        state[j] = here && inside ? (j + 1 == end ? C_before[own] : static_cast<float>(states[there])) : 0.0f;
        read[j] = here && inside ? static_cast<float>(dstates[there]) : 0.0f;
        n_state[j] = here && first ? n_states[at * DQK + row] : 0.0f;
        n_read[j] = here && first ? static_cast<float>(dn_states[at * DQK + row]) : 0.0f;
    }
    for (uint j = 0; j < 4; j++) {
        uint at = head * NC + end - 1 - j;
        float F = metal::exp(decay[j] + m0[j] - after), I = metal::exp(gain[j] - after);
        bool here = j < end;
        if (here && inside) dadds[at * size + element] = static_cast<T>(I * grad);
        if (here && first) dn_adds[at * DQK + row] = I * total;
        grad = here ? F * grad : grad;
        total = here ? F * total : total;
        float along = simd_sum(grad * state[j] + total * n_state[j]);
        if (here && lane == 0 && group < groups) dots[at * groups + group] = along;
        grad += read[j];
        total += n_read[j];
        after = here ? m0[j] : after;
    }
}
if (inside) dC_before[own] = grad;
if (first) dn_before[of] = total;
