// What every processor of the platform has: SSE2 on x86-64, NEON on arm64.
#define IIC_DIST_ISA baseline
#define IIC_DIST_VECTOR_BYTES 16
#if defined(__aarch64__)
#define IIC_DIST_REGISTERS 32
#else
#define IIC_DIST_REGISTERS 16
#endif
