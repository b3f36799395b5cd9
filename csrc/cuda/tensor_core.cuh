// Matrix products of a warp on the tensor cores (sm_80 and later), with TF32 or 16-bit operands, and how their operands
// come into shared memory and from there into registers.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

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
  __device__ void set_bits(int index, uint32_t bits) { set(index, __uint_as_float(bits)); }
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

// D += A B of a warp, 16 bits a value (PTX ISA, mma.m16n8k16): each register holds the two values of which it names the
// first, that one in its lower half. D as above.
//   A (16 x 16): a0 = (g, 2t), a1 = (g + 8, 2t), a2 = (g, 2t + 8), a3 = (g + 8, 2t + 8)
//   B (16 x 8):  b0 = (2t, g), b1 = (2t + 8, g)
template <typename scalar_t>
__device__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<scalar_t, c10::Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<scalar_t, c10::BFloat16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Two values of 16 bits, rounded to nearest: `first` in the lower half.
template <typename scalar_t>
__device__ uint32_t pack(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<scalar_t, c10::Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
}

// Two float32 as kPlanes pairs of bfloat16 that add up to them, largest first: three hold all 24 bits.
template <int kPlanes>
__device__ void split(float first, float second, uint32_t (&planes)[kPlanes]) {
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    planes[p] = pack<c10::BFloat16>(first, second);
    first -= __uint_as_float(planes[p] << 16);
    second -= __uint_as_float(planes[p] & 0xffff0000u);
  }
}

// large + small += A B of operands in planes. Left out are products of planes that count for less than the last plane
// of either: 2^-24 relative of three, 2^-16 of two. b[p] holds kSteps operands, of which `step` is multiplied.
template <int kSteps, int kPlanes>
__device__ void multiply_planes(float (&large)[4], float (&small)[4], const uint32_t (&a)[kPlanes][4],
                                const uint32_t (&b)[kPlanes][2 * kSteps], int step) {
#pragma unroll
  for (int order = kPlanes - 1; order >= 0; --order) {
#pragma unroll
    for (int p = 0; p <= order; ++p) {
      const uint32_t operand[2] = {b[order - p][2 * step], b[order - p][2 * step + 1]};
      mma_16x8x16<c10::BFloat16>(order == 0 ? large : small, a[p], operand);
    }
  }
}

// Four 8 x 8 matrices of 16 bits from shared memory: lanes 8i to 8i + 7 give the addresses of the rows of the i-th, 16
// bytes each, and get in bits[i] the pair (g, 2t), (g, 2t + 1) of it. Of rows of four float32, that is (g, t).
__device__ inline void load_matrices(uint32_t (&bits)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Likewise, transposed: bits[i] holds (2t, g), (2t + 1, g).
__device__ inline void load_matrices_transposed(uint32_t (&bits)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Starts to copy 16 bytes from global to shared memory, both at multiples of 16.
__device__ inline void start_copy(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
}

// Waits for all copies that this thread has started; other threads see them after the next barrier.
__device__ inline void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace iic_dist
