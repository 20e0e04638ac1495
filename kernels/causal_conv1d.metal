uint c = thread_position_in_grid.x, row = thread_position_in_grid.z;
uint S = x_shape[1], C = x_shape[2], P = K - 1, from = thread_position_in_grid.y * 16;
float z[16 + K - 1];
if (c < C) {
    for (uint j = 0; j < 16 + P; j++) {
        uint u = from + j; // counts from the start of the memory
        z[j] = 0.0f;
        if (u < P) z[j] = static_cast<float>(state[(row * P + u) * C + c]);
        else if (u - P < S) z[j] = static_cast<float>(x[(row * S + u - P) * C + c]);
    }
    float taps[K];
    for (uint j = 0; j < K; j++) taps[j] = static_cast<float>(w[c * K + j]);
    for (uint t = 0; t < 16; t++) {
        float sum = static_cast<float>(b[c]);
        for (uint j = 0; j < K; j++) sum += taps[j] * z[t + j];
        if (from + t < S) y[(row * S + from + t) * C + c] = static_cast<T>(sum);
    }
    // the last piece leaves the memory behind
    for (uint j = 0; j < P && from + 16 >= S; j++) {
        uint u = S + j;
        float last = static_cast<float>(u < P ? state[(row * P + u) * C + c] : x[(row * S + u - P) * C + c]);
        kept[(row * P + j) * C + c] = static_cast<T>(last);
    }
}
