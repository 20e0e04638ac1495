// Metal's names for CUDA
#define thread_position_in_grid (uint3{blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z * blockDim.z + threadIdx.z})
#define thread_position_in_threadgroup (uint3{threadIdx.x, threadIdx.y, threadIdx.z})
#define threadgroup_position_in_grid (uint3{blockIdx.x, blockIdx.y, blockIdx.z})
#define thread_index_in_threadgroup (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))
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
inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline void simdgroup_barrier(mem_flags) { __syncwarp(); }
template <class T> T simd_shuffle_xor(T x, ushort mask) { return __shfl_xor_sync(~0u, x, mask); }
inline float simd_sum(float x) { for (int s = 16; s; s /= 2) x += simd_shuffle_xor(x, s); return x; }
inline float simd_max(float x) { for (int s = 16; s; s /= 2) x = max(x, simd_shuffle_xor(x, s)); return x; }
}
using namespace metal;
#define threadgroup __shared__
#define device
#define constant
#define thread
