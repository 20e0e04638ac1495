// y[t] is the largest of x[0] to x[t], for each row: the example of the guide in 02_host
uint t = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
uint group = simdgroup_index_in_threadgroup;
uint row = thread_position_in_grid.y, N = x_shape[1];
threadgroup float tops[8];

float before = static_cast<float>(x[row * N]); // the largest of earlier tiles
for (uint tile = 0; tile < N; tile += 256) {
    uint at = tile + t;
    float top = at < N ? static_cast<float>(x[row * N + at]) : before;
    float mine = top;
    for (uint step = 1; step < 32; step *= 2) {
        float other = simd_shuffle_xor(top, static_cast<ushort>(step));
        if (lane & step) mine = metal::max(mine, other);
        top = metal::max(top, other);
    }
    if (lane == 0) tops[group] = top;
    threadgroup_barrier(mem_flags::mem_threadgroup); // all eight are there
    float largest = before;
    for (uint g = 0; g < 8; g++) {
        if (g == group) mine = metal::max(mine, largest); // of this tile's earlier groups
        largest = metal::max(largest, tops[g]);
    }
    if (at < N) y[row * N + at] = mine;
    before = largest;
    threadgroup_barrier(mem_flags::mem_threadgroup); // all have read, the next tile may write
}
