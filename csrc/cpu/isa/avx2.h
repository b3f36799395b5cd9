// AVX2 from here to isa/end.h. Every other header comes before: the inline functions of those are shared with the rest
// of the program and must not need AVX2.
#define IIC_DIST_ISA avx2
#define IIC_DIST_VECTOR_BYTES 32
#define IIC_DIST_REGISTERS 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
