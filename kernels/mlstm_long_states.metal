uint element = thread_position_in_grid.x, head = thread_position_in_grid.y;
uint NC = adds_shape[2], DQK = adds_shape[3], DV = adds_shape[4], size = DQK * DV;
if (element < size) {
    uint row = element / DV;
    bool first = element % DV == 0;
    float c = C[head * size + element], total = first ? n[head * DQK + row] : 0.0f, m0 = m[head];
    for (uint chunk0 = 0; chunk0 < NC; chunk0 += 4) {
        float decay[4];
        float gain[4];
        float added[4];
        float n_added[4];
        for (uint j = 0; j < 4; j++) {
            uint at = head * NC + chunk0 + j;
            bool here = chunk0 + j < NC;
            decay[j] = here ? log_decay[at] : 0.0f;
            gain[j] = here ? log_adds[at] : 0.0f;
            added[j] = here ? adds[at * size + element] : 0.0f;
            n_added[j] = here && first ? n_adds[at * DQK + row] : 0.0f;
        }
        for (uint j = 0; j < 4; j++) {
            if (chunk0 + j < NC) {
                uint at = head * NC + chunk0 + j;
                float m1 = metal::max(decay[j] + m0, gain[j]);
                float F = metal::exp(decay[j] + m0 - m1), I = metal::exp(gain[j] - m1);
                states[at * size + element] = static_cast<T>(c);
                c = F * c + I * added[j];
                if (first) n_states[at * DQK + row] = total;
                total = F * total + I * n_added[j];
                if (element == 0) m_states[at] = m0;
                m0 = m1;
            }
        }
    }
    C_out[head * size + element] = c;
    if (first) n_out[head * DQK + row] = total;
    if (element == 0) m_out[head] = m0;
}
