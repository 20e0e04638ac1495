// a tile of 64 by 64 numbers: eight SIMD groups have 16 rows and 32 columns each, in eight matrices `acc`
inline uint tile_row(uint group) { return group / 2 * 16; }
inline uint tile_col(uint group) { return group % 2 * 32; }
inline uint tile_at(uint group, uint j) { return (tile_row(group) + j / 4 * 8) * 72 + tile_col(group) + j % 4 * 8; }

template <class A> void clear_tile(A acc) {
    for (uint j = 0; j < 8; j++) acc[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
template <class A> void scale_tile(A acc, float factor) {
    for (uint j = 0; j < 8; j++) {
        acc[j].thread_elements()[0] *= factor;
        acc[j].thread_elements()[1] *= factor;
    }
}
template <class A, class P> void load_tile(A acc, P stage, uint group) {
    for (uint j = 0; j < 8; j++) simdgroup_load(acc[j], stage + tile_at(group, j), 72);
}
template <class A, class P> void store_tile(A acc, P stage, uint group) {
    threadgroup_barrier(mem_flags::mem_threadgroup); // nobody reads what was there before
    for (uint j = 0; j < 8; j++) simdgroup_store(acc[j], stage + tile_at(group, j), 72);
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// acc += x y for the inner indices d to d+7 of 32; a factor lies as its rows, or transposed
template <bool X_TRANSPOSED, bool Y_TRANSPOSED, class A, class P>
void multiply_tile(A acc, P x, P y, uint group, uint d) {
    uint r = tile_row(group), c = tile_col(group);
    uint x_step = X_TRANSPOSED ? 8 : 8 * 40, y_step = Y_TRANSPOSED ? 8 * 36 : 8;
    auto x_from = x + (X_TRANSPOSED ? d * 72 + r : r * 40 + d);
    auto y_from = y + (Y_TRANSPOSED ? c * 36 + d : d * 72 + c);
    simdgroup_float8x8 x0, x1, z;
    simdgroup_load(x0, x_from, X_TRANSPOSED ? 72 : 40, 0, X_TRANSPOSED);
    simdgroup_load(x1, x_from + x_step, X_TRANSPOSED ? 72 : 40, 0, X_TRANSPOSED);
    for (uint j = 0; j < 4; j++) {
        simdgroup_load(z, y_from + j * y_step, Y_TRANSPOSED ? 36 : 72, 0, Y_TRANSPOSED);
        simdgroup_multiply_accumulate(acc[j], x0, z, acc[j]);
        simdgroup_multiply_accumulate(acc[j + 4], x1, z, acc[j + 4]);
    }
}
