uint c = thread_position_in_grid.x, piece = thread_position_in_grid.y, row = thread_position_in_grid.z;
uint S = x_shape[1], C = x_shape[2], P = K - 1, from = piece * 16;
float d[16 + K - 1];
float z[16];
float taps[K];
float sums[K];
if (c < C) {
    for (uint j = 0; j < 16 + P; j++) {
        uint u = from + j; // of dy, K - 1 late
        d[j] = u >= P && u - P < S ? static_cast<float>(dy[(row * S + u - P) * C + c]) : 0.0f;
    }
    for (uint j = 0; j < 16; j++) {
        uint u = from + j;
        z[j] = 0.0f;
        if (u < P) z[j] = static_cast<float>(state[(row * P + u) * C + c]);
        else if (u - P < S) z[j] = static_cast<float>(x[(row * S + u - P) * C + c]);
    }
    for (uint j = 0; j < K; j++) {
        taps[j] = static_cast<float>(w[c * K + j]);
        sums[j] = 0.0f;
    }
    float total = 0.0f;
    for (uint t = 0; t < 16; t++) {
        uint u = from + t;
        float dz = u >= S && u < S + P ? static_cast<float>(dkept[(row * P + u - S) * C + c]) : 0.0f;
        for (uint j = 0; j < K; j++) {
            dz += taps[j] * d[P + t - j];
            sums[j] += z[t] * d[P + t - j];
        }
        total += d[P + t];
        if (u < P) dstate[(row * P + u) * C + c] = dz;
        else if (u < S + P) dx[(row * S + u - P) * C + c] = static_cast<T>(dz);
    }
    uint at = (row * ((S + P + 15) / 16) + piece) * C + c;
    for (uint j = 0; j < K; j++) dw[at * K + j] = sums[j];
    db[at] = total;
}
