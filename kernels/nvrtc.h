// numbers of 16 bits, which are computed as float
struct __half {
    unsigned short bits;
    __half() = default;
    explicit __half(float f) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f)); }
    explicit operator float() const {
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
        return f;
    }
};
struct __nv_bfloat16 { // the upper half of a float
    unsigned short bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float f) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f)); }
    explicit operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};
