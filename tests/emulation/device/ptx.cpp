// The instructions of ptx.h: exact products, sums in float64, rounded towards zero to float32, which is what is known of
// tensor cores. Compiled without instrumentation.
#include "ptx.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstring>

#include "device.h"
#include "memory.h"

namespace emulation::ptx {
namespace {

float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

float towards_zero(double x) {
  const auto nearest = static_cast<float>(x);
  if (std::isnan(x) || std::isinf(nearest) || std::abs(static_cast<double>(nearest)) <= std::abs(x)) return nearest;
  return std::nextafter(nearest, 0.f);
}

unsigned lane() { return thread_index().x % kLanes; }

// What a lane brings to a product: its registers of A, B and C.
struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};

const Fragments& of_lane(const unsigned char* all, unsigned lane) {
  return *reinterpret_cast<const Fragments*>(all + lane * 64);
}

// value_a(fragments of a lane, upper or lower half of rows, k) and value_b are the elements that this lane holds.
template <int kDepth, typename A, typename B>
void multiply(const char* operation, const Fragments& mine, float* const (&d)[4], const A& value_a, const B& value_b) {
  const unsigned char* const all = exchange(operation, &mine, sizeof(mine));
  const unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned e = 0; e < 4; ++e) {
    double sum = mine.c[e];
    for (unsigned k = 0; k < kDepth; ++k) sum += value_a(all, g, e / 2, k) * value_b(all, 2 * t + e % 2, k);
    *d[e] = towards_zero(sum);
  }
}

double tf32(uint32_t bits) { return of_bits(bits & 0xffffe000u); }

template <typename scalar_t>
double half_of(uint32_t bits, unsigned upper) {
  return static_cast<float>(scalar_t(static_cast<uint16_t>(upper ? bits >> 16 : bits), scalar_t::from_bits()));
}

template <typename scalar_t>
void multiply_16(const char* operation, const Fragments& mine, float* const (&d)[4]) {
  multiply<16>(
      operation, mine, d,
      [](const unsigned char* all, unsigned row, unsigned lower_rows, unsigned k) {
        const Fragments& from = of_lane(all, row * 4 + k % 8 / 2);
        return half_of<scalar_t>(from.a[lower_rows + k / 8 * 2], k % 2);
      },
      [](const unsigned char* all, unsigned column, unsigned k) {
        return half_of<scalar_t>(of_lane(all, column * 4 + k % 8 / 2).b[k / 8], k % 2);
      });
}

template <typename scalar_t>
uint32_t pair(float upper, float lower) {
  return static_cast<uint32_t>(scalar_t(upper).x) << 16 | scalar_t(lower).x;
}

// The rows whose addresses the lanes give: lanes 8i to 8i + 7 those of the i-th matrix.
void load_matrices(const char* operation, uint32_t* const (&d)[4], uint32_t row, bool transposed, const void* code) {
  if (row % 16 != 0) fail_at("ldmatrix: a row at an address that is no multiple of 16", code);
  const void* const own = shared_pointer(row);
  watch(own, 16, false, code);
  const unsigned char* const all = exchange(operation, own, 16);
  const unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    uint16_t values[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned r = transposed ? 2 * t + e : g, column = transposed ? g : 2 * t + e;
      std::memcpy(&values[e], all + (8 * i + r) * 64 + 2 * column, 2);
    }
    *d[i] = static_cast<uint32_t>(values[1]) << 16 | values[0];
  }
}

}  // namespace

void ex2_approx_ftz_f32(float& d, float a) {
  const float power = std::exp2(std::fpclassify(a) == FP_SUBNORMAL ? 0.f : a);
  d = std::fpclassify(power) == FP_SUBNORMAL ? 0.f : power;
}

// To nearest, ties away from zero.
void cvt_rna_tf32_f32(uint32_t& d, float a) {
  d = std::isfinite(a) ? (bits_of(a) + 0x1000u) & 0xffffe000u : bits_of(a) & 0xffffe000u;
  if (std::isnan(a)) d = 0x7fffe000u;
}

void cvt_rn_f16x2_f32(uint32_t& d, float upper, float lower) { d = pair<c10::Half>(upper, lower); }
void cvt_rn_bf16x2_f32(uint32_t& d, float upper, float lower) { d = pair<c10::BFloat16>(upper, lower); }

void mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                        uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                        uint32_t b1, float c0, float c1, float c2, float c3) {
  multiply<8>(
      "mma.m16n8k8", {{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}}, {&d0, &d1, &d2, &d3},
      [](const unsigned char* all, unsigned row, unsigned lower_rows, unsigned k) {
        return tf32(of_lane(all, row * 4 + k % 4).a[lower_rows + k / 4 * 2]);
      },
      [](const unsigned char* all, unsigned column, unsigned k) {
        return tf32(of_lane(all, column * 4 + k % 4).b[k / 4]);
      });
}

void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                       uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                                                       float c0, float c1, float c2, float c3) {
  multiply_16<c10::Half>("mma.m16n8k16.f16", {{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}}, {&d0, &d1, &d2, &d3});
}

void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                         uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                         uint32_t b1, float c0, float c1, float c2, float c3) {
  multiply_16<c10::BFloat16>("mma.m16n8k16.bf16", {{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}},
                             {&d0, &d1, &d2, &d3});
}

void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t row) {
  load_matrices("ldmatrix", {&d0, &d1, &d2, &d3}, row, false, __builtin_return_address(0));
}

void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3,
                                                    uint32_t row) {
  load_matrices("ldmatrix.trans", {&d0, &d1, &d2, &d3}, row, true, __builtin_return_address(0));
}

void cp_async_cg_shared_global(uint32_t shared, uint64_t global, int bytes) {
  const void* const code = __builtin_return_address(0);
  if (bytes != 16) fail_at("cp.async.cg copies 16 bytes", code);
  if (shared % 16 != 0 || global % 16 != 0) fail_at("cp.async: an address that is no multiple of 16", code);
  start_copy(shared_pointer(shared), reinterpret_cast<const void*>(global), 16, code);
}

void cp_async_wait_all() { finish_copies(); }

}  // namespace emulation::ptx
