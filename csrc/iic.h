// The contract of the three IIC ops that the CPU and CUDA files share; library.cpp holds the schemas.
//
//   iic_joint(logits_a, logits_b) -> (sums, probs_a, probs_b)
//   iic_information(sums, num_clusters, entropy_weight)
//       -> (loss, mutual_information, entropy, conditional_entropy, joint, joint_grad)
//   iic_logits_grad(logits_a, logits_b, probs_a, probs_b, joint_grad, grad_loss) -> (grad_a, grad_b)
//
// logits_a    (N, H, K), any strides (expanded and permuted too); float64, float32, bfloat16 or float16.
// logits_b    (R*N, H, K), same dtype and device, any strides; repeat r of sample i stands in row r*N + i.
// sums        (H*K*K + 1,), contiguous, in acc_type: the H matrices M = sum_i z_i (sum_r z'_ri)^T one after
// the
//             other, row-major, and last the number of pairs R*N. One buffer, so that one all-reduce over the
//             ranks between the first and the second op carries both; no copy, no host sync.
// probs_a, _b the softmaxes kept for the third op. Layout and dtype are private to the backend, which may
// keep
//             nothing (shape (0,)) and recompute; the fake kernel in iic_dist/ops/iic.py states the shape.
// loss, mutual_information, entropy, conditional_entropy   (H,), acc_type, nats.
// joint       (H, K, K), max((M + M^T) / 2T, eps), acc_type.
// joint_grad  (H, K, K), symmetric, -(ln P - w (ln q_row + ln q_col)) / T, acc_type; not yet times grad_loss.
// grad_loss   (H,), acc_type, ANY stride (0 from sum().backward()), already times the world size; read on the
// device. grad_a, _b  contiguous, shapes and dtype of the logits:  c z (g - <z, g>),  g_i = G sum_r z'_ri,
// g'_ri = G z_i.
//
// acc_type is float32, or float64 for float64 logits. NaN in, NaN out: clamps must let NaN pass (x < eps ?
// eps : x). The result does not depend on the number of threads or on timing: no float atomics.
#pragma once

#include <ATen/core/Tensor.h>

namespace iic_dist {

// Floor of a probability before its logarithm: float64's machine epsilon, as in the published code.
constexpr double kEps = 2.2e-16;

inline void check_iic_logits(const at::Tensor& a, const at::Tensor& b) {
  TORCH_CHECK_VALUE(a.dim() == 3 && b.dim() == 3 && a.size(1) == b.size(1) && a.size(2) == b.size(2),
                    "logits_a ", a.sizes(), " and logits_b ", b.sizes(),
                    ": must be (N, H, K) and (R*N, H, K)");
  TORCH_CHECK_VALUE(a.numel() > 0 && b.numel() > 0, "logits_a ", a.sizes(), " and logits_b ", b.sizes(),
                    ": an empty batch has no joint; give every rank at least one pair");
  TORCH_CHECK_VALUE(b.size(0) % a.size(0) == 0, "logits_a ", a.sizes(), " and logits_b ", b.sizes(),
                    ": the second views must be a whole multiple of the first ones");
  TORCH_CHECK_VALUE(a.scalar_type() == b.scalar_type() && a.device() == b.device(), "logits_a ",
                    a.scalar_type(), " on ", a.device(), " and logits_b ", b.scalar_type(), " on ",
                    b.device(), ": must be of one dtype on one device");
}

// H of a sums buffer of K x K matrices.
inline int64_t heads_of_sums(const at::Tensor& sums, int64_t num_clusters) {
  const int64_t size = num_clusters * num_clusters;
  TORCH_CHECK_VALUE(size > 0 && sums.dim() == 1 && sums.is_contiguous() && sums.numel() > size &&
                        sums.numel() % size == 1 % size,
                    "sums ", sums.sizes(), " for ", num_clusters,
                    " clusters: must be a contiguous vector of H*K*K + 1 values");
  return (sums.numel() - 1) / size;
}

}  // namespace iic_dist
