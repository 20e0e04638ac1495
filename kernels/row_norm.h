// mean of a row, and one over its standard deviation, by the lanes of a SIMD group
template <class P> float row_mean(P x, uint width, uint lane) {
    float sum = 0.0f;
    for (uint d = lane; d < width; d += 32) sum += static_cast<float>(x[d]);
    return simd_sum(sum) / static_cast<float>(width);
}
template <class P> float row_scale(P x, uint width, uint lane, float mean, float eps) {
    float squares = 0.0f;
    for (uint d = lane; d < width; d += 32) {
        float z = static_cast<float>(x[d]) - mean;
        squares += z * z;
    }
    return metal::rsqrt(simd_sum(squares) / static_cast<float>(width) + eps);
}
