// The PTX instructions of csrc/cuda, named by their opcodes, with their operands in the order of the assembler's text.
// `asm("OPCODE %0, %1;" : ...)` is translated to a call of one of these; the layouts are those of the PTX ISA.
#pragma once

#include <cstdint>

namespace emulation::ptx {

void ex2_approx_ftz_f32(float& d, float a);
void cvt_rna_tf32_f32(uint32_t& d, float a);
void cvt_rn_f16x2_f32(uint32_t& d, float upper, float lower);
void cvt_rn_bf16x2_f32(uint32_t& d, float upper, float lower);

// d (16 x 8) = a (16 x k) b (k x 8) + c
void mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                        uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                        uint32_t b1, float c0, float c1, float c2, float c3);
void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                       uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                                                       float c0, float c1, float c2, float c3);
void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0,
                                                         uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                                         uint32_t b1, float c0, float c1, float c2, float c3);

// Four 8 x 8 matrices of 16 bits; `row` is an address in shared memory.
void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t row);
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3,
                                                    uint32_t row);

// The copy happens when it is waited for, at the latest possible moment; until then its destination is forbidden.
void cp_async_cg_shared_global(uint32_t shared, uint64_t global, int bytes);
void cp_async_wait_all();

}  // namespace emulation::ptx
