// Kernels that do what a GPU forbids or leaves to chance, each in one way, beside one that is right. A block of 64
// threads; `in` and `out` hold 64 values. Each function at the end runs one, and gives what the device says, or null.
#include <exception>
#include <string>

namespace {

__global__ void kernel_right(const float* in, float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void kernel_no_barrier(const float* in, float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void kernel_race(const float* in, float* out) {
  __shared__ float sum;
  sum = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = sum;
}

__global__ void kernel_unwritten(const float* in, float* out) {
  __shared__ float values[65];
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + 1];
}

__global__ void kernel_read_past(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

__global__ void kernel_write_past(const float* in, float* out) { out[threadIdx.x * 2] = in[threadIdx.x]; }

__global__ void kernel_shared_past(const float* in, float* out) {
  __shared__ float values[63];
  float* const pointer = values;
  pointer[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = pointer[0];
}

__global__ void kernel_register_past(const float* in, float* out) {
  float values[4] = {};
  for (int i = 0; i < 4; ++i) values[i + threadIdx.x / 63] = in[i];
  out[threadIdx.x] = values[threadIdx.x % 4];
}

__global__ void kernel_misaligned(const float* in, float* out) {
  *reinterpret_cast<float2*>(out + (threadIdx.x & 62) + 1) = make_float2(in[0], in[1]);
}

__global__ void kernel_part_of_a_block(const float* in, float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void kernel_part_of_a_warp(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) value += __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

__global__ void kernel_two_barriers(const float* in, float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void kernel_no_wait(const float* in, float* out) {
  alignas(16) __shared__ float values[64];
  if (threadIdx.x < 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(values + threadIdx.x * 4))),
                 "l"(__cvta_generic_to_global(in + threadIdx.x * 4)));
  }
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

// What the instructions make of in[0], in[1].
__global__ void kernel_instructions(const float* in, float* out) {
  uint32_t bits;
  float power;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(in[0]));
  if (threadIdx.x == 0) out[0] = __uint_as_float(bits);
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(in[1]), "f"(in[0]));
  if (threadIdx.x == 0) out[1] = __uint_as_float(bits << 16);
  if (threadIdx.x == 0) out[2] = __uint_as_float(bits & 0xffff0000u);
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(in[2]));
  if (threadIdx.x == 0) out[3] = power;
}

// D = A B with A (16 x 8) in in[0], ..., B (8 x 8) the identity; TF32.
__global__ void kernel_product(const float* in, float* out) {
  if (threadIdx.x >= 32) return;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a[4], b[2];
  float d[4] = {};
  for (int i = 0; i < 4; ++i) {
    const float x = in[((g + i % 2 * 8) * 8 + t + i / 2 * 4) % 64];
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(a[i]) : "f"(x));
  }
  for (int i = 0; i < 2; ++i) asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(b[i]) : "f"(t + i * 4 == g ? 1.f : 0.f));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int i = 0; i < 2; ++i) out[g * 8 + t * 2 + i] = d[i];
}

}  // namespace

#define EXPORT(name)                                              \
  extern "C" const char* name(const float* in, float* out) {      \
    static std::string said;                                      \
    try {                                                         \
      kernel_##name<<<1, 64>>>(in, out);                          \
      return nullptr;                                             \
    } catch (const std::exception& error) {                       \
      said = error.what();                                        \
      return said.c_str();                                        \
    }                                                             \
  }

EXPORT(right)
EXPORT(no_barrier)
EXPORT(race)
EXPORT(unwritten)
EXPORT(read_past)
EXPORT(write_past)
EXPORT(shared_past)
EXPORT(register_past)
EXPORT(misaligned)
EXPORT(part_of_a_block)
EXPORT(part_of_a_warp)
EXPORT(two_barriers)
EXPORT(no_wait)
EXPORT(instructions)
EXPORT(product)
