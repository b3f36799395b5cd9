// AVX-512 from here to isa/end.h. Every other header comes before: the inline functions of those are shared with the
// rest of the program and must not need AVX-512.
#define IIC_DIST_ISA avx512
#define IIC_DIST_VECTOR_BYTES 64
#define IIC_DIST_REGISTERS 32
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
