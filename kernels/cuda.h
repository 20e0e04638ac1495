// Metal's names for CUDA
#define thread_position_in_grid \
    (uint3{blockIdx.x * blockDim.x + threadIdx.x, \
           blockIdx.y * blockDim.y + threadIdx.y, \
           blockIdx.z * blockDim.z + threadIdx.z})
#define thread_position_in_threadgroup (uint3{threadIdx.x, threadIdx.y, threadIdx.z})
#define threadgroup_position_in_grid (uint3{blockIdx.x, blockIdx.y, blockIdx.z})
#define thread_index_in_threadgroup \
    (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))
#define thread_index_in_simdgroup (thread_index_in_threadgroup & 31)
#define simdgroup_index_in_threadgroup (thread_index_in_threadgroup >> 5)
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
typedef __half half;
typedef __nv_bfloat16 bfloat16_t;

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline float exp(float x) { return expf(x); }
inline float log(float x) { return logf(x); }
inline float tanh(float x) { return tanhf(x); }
inline float sqrt(float x) { return sqrtf(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float abs(float x) { return fabsf(x); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline uint min(uint a, uint b) { return a < b ? a : b; }
inline uint max(uint a, uint b) { return a > b ? a : b; }
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }
template <class T> T simd_shuffle(T x, ushort lane) { return __shfl_sync(~0u, x, lane); }
template <class T> T simd_shuffle_xor(T x, ushort mask) { return __shfl_xor_sync(~0u, x, mask); }
inline float simd_sum(float x) {
    for (int s = 16; s; s /= 2) x += simd_shuffle_xor(x, s);
    return x;
}
inline float simd_max(float x) {
    for (int s = 16; s; s /= 2) x = max(x, simd_shuffle_xor(x, s));
    return x;
}
}

namespace metal {
// an 8 by 8 matrix of a SIMD group: two neighbours of a row in each lane
struct simdgroup_float8x8 {
    float e[2];
    float* thread_elements() { return e; }
};
inline uint lane_row() {
    uint lane = thread_index_in_simdgroup;
    return (lane / 4 & 4) + lane / 2 % 4;
}
inline uint lane_column() {
    uint lane = thread_index_in_simdgroup;
    return (lane / 4 & 2) * 2 + lane % 2 * 2;
}
inline uint lane_of(uint r, uint c) {
    return ((r & 4) << 2) + ((r & 3) << 1) + ((c & 4) << 1) + ((c & 2) >> 1);
}
template <class T, int R, int C> simdgroup_float8x8 make_filled_simdgroup_matrix(T x) { return {{x, x}}; }
inline void simdgroup_load(simdgroup_float8x8& m, const float* p, ulong width) {
    p += lane_row() * width + lane_column();
    m.e[0] = p[0];
    m.e[1] = p[1];
}
inline void simdgroup_store(simdgroup_float8x8 m, float* p, ulong width) {
    p += lane_row() * width + lane_column();
    p[0] = m.e[0];
    p[1] = m.e[1];
}
inline void simdgroup_multiply_accumulate(
    simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b, simdgroup_float8x8 c
) {
    uint row = lane_row(), column = lane_column();
    for (uint i = 0; i < 8; i++) {
        float x = simd_shuffle(i % 2 ? a.e[1] : a.e[0], lane_of(row, i));
        c.e[0] += x * simd_shuffle(b.e[0], lane_of(i, column));
        c.e[1] += x * simd_shuffle(b.e[1], lane_of(i, column));
    }
    d = c;
}
}

using namespace metal;
#define threadgroup __shared__
#define device
#define constant
#define thread
