// What iic_cpu.cpp asks of an instruction set. iic_cpu_{avx512,avx2,baseline}.cpp each compile
// iic_kernels.inc for one.
//
// Softmaxes are kept in panels of 64 samples, (K, 64) each: the sample is the fast index, so that every sum
// over clusters is a plain vector sum and K needs no padding.
#pragma once

#include <cstdint>

namespace iic_dist::cpu {

constexpr int64_t kPanel =
    64;  // samples, for every instruction set: the shape that is kept does not depend on it

// Logits of one view: T[row * row_stride + head * head_stride + cluster * cluster_stride].
template <typename T>
struct Logits {
  const T* data;
  int64_t row_stride, head_stride, cluster_stride;
  const T* end;  // one past the last element: how far a whole vector may read beyond a row
};

struct Shape {
  int64_t samples, heads, clusters, repeats;
  int64_t panels;  // of 64 samples, the last one padded with zeros
  int64_t
      chunk_panels;  // panels that one task handles: from the shape alone, never from the number of threads
};

// T: type of the logits, A: type of everything else.
template <typename T, typename A>
struct JointTask {
  Shape shape;
  Logits<T> a, b;
  A* probs_a;   // (H, panels, K, 64)
  A* probs_b;   // (R, H, panels, K, 64)
  A* partials;  // (H, chunks, K, K)
};

template <typename T, typename A>
struct LogitsGradTask {
  Shape shape;
  const A* probs_a;
  const A* probs_b;
  const A* joint_grad;  // (H, K, K), symmetric
  const A* grad_loss;   // (H,)
  int64_t grad_loss_stride;
  T* grad_a;  // (N, H, K)
  T* grad_b;  // (R*N, H, K)
};

template <typename A>
struct InformationTask {
  int64_t heads, clusters;
  A entropy_weight;
  const A* sums;  // H*K*K + 1
  A *loss, *mutual_information, *entropy, *conditional_entropy, *joint, *joint_grad;
};

// Each function does one independent piece of work: a chunk of a sub-head, or a sub-head.
template <typename T, typename A>
struct Kernels {
  void (*joint)(const JointTask<T, A>&, int64_t head, int64_t chunk);
  void (*logits_grad)(const LogitsGradTask<T, A>&, int64_t head, int64_t chunk);
  void (*information)(const InformationTask<A>&, int64_t head);
};

namespace avx512 {
template <typename T, typename A>
Kernels<T, A> kernels();
}
namespace avx2 {
template <typename T, typename A>
Kernels<T, A> kernels();
}
namespace baseline {
template <typename T, typename A>
Kernels<T, A> kernels();
}

}  // namespace iic_dist::cpu
