uint element = thread_position_in_grid.x, head = thread_position_in_grid.y, lane = thread_index_in_simdgroup;
uint NC = states_shape[2], DQK = states_shape[3], DV = states_shape[4], size = DQK * DV, groups = (size + 31) / 32;
uint row = element / DV, group = element / 32, of = head * DQK + row, own = head * size + element;
bool inside = element < size, first = inside && element % DV == 0;
float grad = inside ? dC[own] : 0.0f, total = first ? dn[of] : 0.0f, after = m[head];
for (uint chunk = NC; chunk > 0; chunk--) {
    uint at = head * NC + chunk - 1, there = at * size + element;
    float m0 = m_states[at], F = metal::exp(log_decay[at] + m0 - after), I = metal::exp(log_adds[at] - after), along = 0.0f;
    after = m0;
    if (inside) {
        dadds[there] = static_cast<T>(I * grad);
        grad = F * grad;
        along = grad * (chunk == 1 ? C_before[own] : static_cast<float>(states[there]));
        grad += static_cast<float>(dstates[there]);
    }
    if (first) {
        dn_adds[at * DQK + row] = I * total;
        total = F * total;
        along += total * n_states[at * DQK + row];
        total += static_cast<float>(dn_states[at * DQK + row]);
    }
    along = simd_sum(along);
    if (lane == 0 && group < groups) dots[at * groups + group] = along;
}
if (inside) dC_before[own] = grad;
if (first) dn_before[of] = total;
