uint t = thread_index_in_threadgroup, head = threadgroup_position_in_grid.y, row = threadgroup_position_in_grid.z;
uint NH = x_shape[1], S = x_shape[2], unit = (row * NH + head) * DH + t;
threadgroup float hidden[DH];
threadgroup float raw[4 * DH];

// a thread has PER of the 4 DH rows of R, and their next inputs
float weights[RESIDENT ? PER * DH : 1];
float ahead[PER];
for (uint p = 0; p < PER; p++) {
    uint j = p * THREADS + t;
    ahead[p] = j < 4 * DH ? static_cast<float>(x[(row * NH + head) * S * 4 * DH + j]) : 0.0f;
    for (uint e = 0; e < DH && RESIDENT; e++)
        weights[p * DH + e] = j < 4 * DH ? static_cast<float>(R[(head * DH + e) * 4 * DH + j]) : 0.0f;
}
// the first threads also have a unit each
float y0 = 0.0f, c0 = 0.0f, n0 = 0.0f, m0 = 0.0f;
if (t < DH) {
    y0 = y_in[unit];
    c0 = c_in[unit];
    n0 = n_in[unit];
    m0 = m_in[unit];
    hidden[t] = y0;
}
bool first = is_empty[row];

for (uint s = 0; s < S; s++) {
    uint token = (row * NH + head) * S + s;
    uint mark = marks[row * S + s];
    if (mark == 2) { // a text begins
        first = true;
        c0 = n0 = m0 = 0.0f;
        if (t < DH) hidden[t] = 0.0f;
    }
    if (mark > 0) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint p = 0; p < PER; p++) {
            uint j = p * THREADS + t;
            if (j < 4 * DH) {
                float sum = ahead[p] + static_cast<float>(b[head * 4 * DH + j]);
                for (uint e = 0; e < DH; e++) {
                    float w = RESIDENT ? weights[p * DH + e] : static_cast<float>(R[(head * DH + e) * 4 * DH + j]);
                    sum += hidden[e] * w;
                }
                raw[j] = sum;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t < DH) {
            float i = raw[t], f = raw[DH + t], z = raw[2 * DH + t], o = raw[3 * DH + t];
            float log_f = log_sigmoid(f), m1 = first ? i : metal::max(log_f + m0, i);
            float F = metal::exp(metal::min(log_f + m0 - m1, 0.0f)), I = metal::exp(i - m1);
            c0 = F * c0 + I * metal::tanh(z);
            n0 = F * n0 + I;
            m0 = m1;
            y0 = c0 / n0 / (1.0f + metal::exp(-o));
            hidden[t] = y0;
        }
        first = false;
    }
    // while the units work, the inputs of the next token come
    for (uint p = 0; p < PER && s + 1 < S; p++) {
        uint j = p * THREADS + t;
        if (j < 4 * DH) ahead[p] = static_cast<float>(x[(token + 1) * 4 * DH + j]);
    }
    if (t < DH) {
        y[token * DH + t] = y0;
        c[token * DH + t] = c0;
        n[token * DH + t] = n0;
        m[token * DH + t] = m0;
    }
}
