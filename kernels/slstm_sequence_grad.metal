uint t = thread_index_in_threadgroup, head = threadgroup_position_in_grid.y, row = threadgroup_position_in_grid.z;
uint NH = dy_shape[1], S = dy_shape[2], unit = (row * NH + head) * DH + t;
threadgroup float dgates[4 * DH];   // gradient of what enters each gate
threadgroup float parts[4 * DH];    // of each gate's share in the gradient of y

// a thread has PER of the 4 DH pairs of a gate and an input of R
float weights[RESIDENT ? PER * DH : 1];
for (uint p = 0; p < PER && RESIDENT; p++) {
    uint j = p * THREADS + t, gate = j / DH, e = j % DH;
    for (uint d = 0; d < DH; d++)
        weights[p * DH + d] = j < 4 * DH ? static_cast<float>(R[((head * 4 + gate) * DH + d) * DH + e]) : 0.0f;
}
float gy = 0.0f, gc = 0.0f, gn = 0.0f, gm = 0.0f;
if (t < DH) {
    gc = dc[unit];
    gn = dn[unit];
    gm = dm[unit];
}

for (uint back = 0; back < S; back++) {
    uint s = S - 1 - back, token = (row * NH + head) * S + s, at = token * DH + t;
    uint mark = marks[row * S + s];
    bool inside = mark > 0, begins = mark == 2;
    if (t < DH) gy += dy[at];
    if (t < DH && inside) {
        float i = raw[token * 4 * DH + t], f = raw[token * 4 * DH + DH + t];
        float z = metal::tanh(raw[token * 4 * DH + 2 * DH + t]);
        float o = sigmoid(raw[token * 4 * DH + 3 * DH + t]);
        float c0 = s > 0 ? c[at - DH] : c_in[unit], n0 = s > 0 ? n[at - DH] : n_in[unit];
        float m0 = s > 0 ? m[at - DH] : m_in[unit];
        if (begins) c0 = n0 = m0 = 0.0f;
        float log_f = log_sigmoid(f);
        float F = metal::exp(metal::min(log_f + m0 - m[at], 0.0f)), I = metal::exp(i - m[at]);
        float ratio = c[at] / n[at];
        gc += gy * o / n[at];
        gn -= gy * o * ratio / n[at];
        float gi = (gc * z + gn) * I, gf = (gc * c0 + gn * n0) * F;
        // the stabiliser is one of the exponents; a unit that has read nothing has n = 0
        bool newest = n0 == 0.0f || i > log_f + m0;
        if (newest) gi += gm;
        else gf += gm;
        gm = newest ? 0.0f : gm;
        dgates[t] = gi;
        dgates[DH + t] = gf / (1.0f + metal::exp(f));
        dgates[2 * DH + t] = gc * I * (1.0f - z * z);
        dgates[3 * DH + t] = gy * ratio * o * (1.0f - o);
        gc *= begins ? 0.0f : F;
        gn *= begins ? 0.0f : F;
    }

    if (inside) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint p = 0; p < PER; p++) {
            uint j = p * THREADS + t, gate = j / DH, e = j % DH, row0 = (head * 4 + gate) * DH;
            float sum = 0.0f;
            for (uint d = 0; d < DH && j < 4 * DH; d++) {
                float w = RESIDENT ? weights[p * DH + d] : static_cast<float>(R[(row0 + d) * DH + e]);
                sum += dgates[gate * DH + d] * w;
            }
            if (j < 4 * DH) parts[j] = sum;
        }
    }
    for (uint j = t; j < 4 * DH; j += THREADS) dx[token * 4 * DH + j] = inside ? dgates[j] : 0.0f;
    if (inside) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t < DH) gy = begins ? 0.0f : parts[t] + parts[DH + t] + parts[2 * DH + t] + parts[3 * DH + t];
    }
}
if (t < DH) {
    dy_in[unit] = gy;
    dc_in[unit] = gc;
    dn_in[unit] = gn;
    dm_in[unit] = gm;
}
