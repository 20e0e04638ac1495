typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat16_t;
struct uint3 { uint x, y, z; };
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
namespace metal {
float exp(float);
float log(float);
float tanh(float);
float sqrt(float);
float rsqrt(float);
float abs(float);
float max(float, float);
float min(float, float);
int max(int, int);
int min(int, int);
uint max(uint, uint);
uint min(uint, uint);
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
float simd_sum(float);
float simd_max(float);
template <class T> T simd_shuffle(T, ushort);
template <class T> T simd_shuffle_xor(T, ushort);

struct simdgroup_float8x8 { float* thread_elements(); };
template <class T, int R, int C> simdgroup_float8x8 make_filled_simdgroup_matrix(T);
void simdgroup_load(simdgroup_float8x8&, const device float*, ulong, int = 0, bool = false);
void simdgroup_load(simdgroup_float8x8&, const threadgroup float*, ulong, int = 0, bool = false);
void simdgroup_store(simdgroup_float8x8, device float*, ulong);
void simdgroup_store(simdgroup_float8x8, threadgroup float*, ulong);
void simdgroup_multiply_accumulate(
    simdgroup_float8x8&, simdgroup_float8x8, simdgroup_float8x8, simdgroup_float8x8
);
}
using namespace metal;
