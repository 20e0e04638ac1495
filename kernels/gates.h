// the sigmoid, and its logarithm to float32 accuracy
inline float sigmoid(float x) { return 1.0f / (1.0f + metal::exp(-x)); }
inline float log_sigmoid(float x) {
    float e = metal::exp(-metal::abs(x)), u = 1.0f + e;
    return metal::min(x, 0.0f) - (u == 1.0f ? e : e * metal::log(u) / (u - 1.0f));
}
