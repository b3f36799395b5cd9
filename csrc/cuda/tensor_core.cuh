// 16 x 8 x 8 matrix products of a warp on the tensor cores (sm_80 and later), with TF32 operands.
#pragma once

#include <cstdint>

namespace iic_dist {

// Rounds to TF32: 10 bits of mantissa, round to nearest. NaN stays NaN.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

// D += A B of a warp. With g = lane / 4 and t = lane % 4 (PTX ISA, mma.m16n8k8):
//   A (16 x 8): a0 = (g, t), a1 = (g + 8, t), a2 = (g, t + 4), a3 = (g + 8, t + 4)
//   B (8 x 8):  b0 = (t, g), b1 = (t + 4, g)
//   D (16 x 8): d0 = (g, 2t), d1 = (g, 2t + 1), d2 = (g + 8, 2t), d3 = (g + 8, 2t + 1)
__device__ inline void mma_16x8x8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// This lane's part of an operand. kExact keeps what rounding to TF32 loses in a second TF32 number.
template <int kRegisters, bool kExact>
struct Operand {
  uint32_t high[kRegisters], low[kRegisters];

  __device__ void set(int index, float x) {
    high[index] = to_tf32(x);
    if (kExact) low[index] = to_tf32(x - __uint_as_float(high[index]));
  }
};

// D[n] += A B[n] for several B. One TF32 product is good to 2^-11 relative, too coarse for float32 inputs; kExact
// adds both cross terms ("3xTF32") and leaves 2^-21. The loops keep products into one D apart, to hide latency.
template <bool kExact, int kTiles>
__device__ void multiply_add(float (&d)[kTiles][4], const Operand<4, kExact>& a,
                             const Operand<2, kExact> (&b)[kTiles]) {
  if (kExact) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_16x8x8(d[n], a.low, b[n].high);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_16x8x8(d[n], a.high, b[n].low);
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) mma_16x8x8(d[n], a.high, b[n].high);
}

}  // namespace iic_dist
