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
inline uint lane_row() { return thread_index_in_simdgroup / 4; }
inline uint lane_column() { return thread_index_in_simdgroup % 4 * 2; }
template <class T, int R, int C> simdgroup_float8x8 make_filled_simdgroup_matrix(T x) { return {{x, x}}; }
inline void simdgroup_load(simdgroup_float8x8& m, const float* p, ulong width, int = 0, bool transposed = false) {
    ulong down = transposed ? 1 : width, right = transposed ? width : 1;
    p += lane_row() * down + lane_column() * right;
    m.e[0] = p[0];
    m.e[1] = p[right];
}
inline void simdgroup_store(simdgroup_float8x8 m, float* p, ulong width) {
    p += lane_row() * width + lane_column();
    p[0] = m.e[0];
    p[1] = m.e[1];
}
}

namespace metal {
inline uint high(float x) { // the nearest float of 10 bits
    uint y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
inline uint low(float x, uint high) { return __float_as_uint(x - __uint_as_float(high)); }
inline void add_products(float* c, uint h0, uint l0, uint h1, uint l1, uint b0, uint b1) {
    float d[4];
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(h0), "r"(l0), "r"(h1), "r"(l1), "r"(b0), "r"(b1), "f"(0.0f));
    c[0] += d[0] + d[2];
    c[1] += d[1] + d[3];
}
inline void simdgroup_multiply_accumulate(
    simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b, simdgroup_float8x8 c
) {
    uint lane = thread_index_in_simdgroup, from = lane % 4 * 8 + lane / 8;
    bool odd = lane / 4 % 2;
    float x0 = simd_shuffle(b.e[0], from), x1 = simd_shuffle(b.e[1], from);
    float y0 = simd_shuffle(b.e[0], from + 4), y1 = simd_shuffle(b.e[1], from + 4);
    float x = odd ? x1 : x0, y = odd ? y1 : y0;
    uint a0 = high(a.e[0]), a1 = high(a.e[1]), bx = high(x), by = high(y);
    uint low0 = low(a.e[0], a0), low1 = low(a.e[1], a1);
    add_products(c.e, a0, low0, a1, low1, low(x, bx), low(y, by));
    add_products(c.e, a0, low0, a1, low1, bx, by);
    d = c;
}
}

using namespace metal;
#define threadgroup __shared__
#define device
#define constant
#define thread
