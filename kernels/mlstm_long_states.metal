uint element = thread_position_in_grid.x, head = thread_position_in_grid.y;
uint NC = adds_shape[2], DQK = adds_shape[3], DV = adds_shape[4], size = DQK * DV;
if (element < size) {
    uint row = element / DV;
    bool first = element % DV == 0;
    float c = C[head * size + element], total = first ? n[head * DQK + row] : 0.0f, m0 = m[head];
    for (uint chunk = 0; chunk < NC; chunk++) {
        uint at = head * NC + chunk;
        float m1 = metal::max(log_decay[at] + m0, log_adds[at]);
        float F = metal::exp(log_decay[at] + m0 - m1), I = metal::exp(log_adds[at] - m1);
        states[at * size + element] = static_cast<T>(c);
        c = F * c + I * adds[at * size + element];
        if (first) {
            n_states[at * DQK + row] = total;
            total = F * total + I * n_adds[at * DQK + row];
        }
        if (element == 0) m_states[at] = m0;
        m0 = m1;
    }
    C_out[head * size + element] = c;
    if (first) n_out[head * DQK + row] = total;
    if (element == 0) m_out[head] = m0;
}
