// The IIC ops on the CPU: checks, allocation, choice of instruction set, and the split into tasks.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include "../iic.h"
#include "iic_kernels.h"

namespace iic_dist {
namespace {

using cpu::kPanel;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The best of the compiled instruction sets that this processor has; ATEN_CPU_CAPABILITY=avx2|default lowers
// it.
template <typename T, typename A>
cpu::Kernels<T, A> choose_kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return cpu::avx512::kernels<T, A>();
  if (capability == "AVX2") return cpu::avx2::kernels<T, A>();
#endif
  return cpu::baseline::kernels<T, A>();
}

// At most 512 samples a task keep both views of K = 200 in a 1 MiB cache, but 2K samples, so that the partial
// joints of large K take less memory than the softmaxes. The chunks of a sub-head are of nearly one size.
cpu::Shape shape_of(const at::Tensor& logits_a, const at::Tensor& logits_b) {
  const int64_t n = logits_a.size(0), k = logits_a.size(2);
  const int64_t panels = ceil_div(n, kPanel),
                chunks = ceil_div(panels, std::max<int64_t>(8, ceil_div(2 * k, kPanel)));
  return {n, logits_a.size(1), k, logits_b.size(0) / n, panels, ceil_div(panels, chunks)};
}

int64_t chunks_of(const cpu::Shape& shape) { return ceil_div(shape.panels, shape.chunk_panels); }

template <typename T>
cpu::Logits<T> logits_of(const at::Tensor& x) {
  const T* data = x.const_data_ptr<T>();
  int64_t last = 0;
  for (int64_t d = 0; d < 3; ++d) last += (x.size(d) - 1) * x.stride(d);
  return {data, x.stride(0), x.stride(1), x.stride(2), data + last + 1};
}

at::ScalarType acc_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// One call of `work(head, chunk)` for each chunk of each sub-head, in any order on any thread.
template <typename Work>
void for_each_chunk(const cpu::Shape& shape, const Work& work) {
  const int64_t chunks = chunks_of(shape);
  at::parallel_for(0, shape.heads * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) work(task / chunks, task % chunks);
  });
}

// Sums the chunks of each sub-head in their order, whatever the number of threads.
template <typename A>
void sum_chunks(const at::Tensor& partials, A* sums) {
  const int64_t chunks = partials.size(1), size = partials.size(2);
  at::parallel_for(0, partials.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const A* part = partials.const_data_ptr<A>() + head * chunks * size;
      A* sum = sums + head * size;
      std::copy(part, part + size, sum);
      for (int64_t c = 1; c < chunks; ++c)
        for (int64_t i = 0; i < size; ++i) sum[i] += part[c * size + i];
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> iic_joint_cpu(const at::Tensor& logits_a,
                                                             const at::Tensor& logits_b) {
  check_iic_logits(logits_a, logits_b);
  const cpu::Shape shape = shape_of(logits_a, logits_b);
  const int64_t h = shape.heads, k = shape.clusters;
  const auto options = logits_a.options().dtype(acc_type(logits_a));
  at::Tensor sums = at::empty({h * k * k + 1}, options);
  at::Tensor probs_a = at::empty({h, shape.panels, k, kPanel}, options);
  at::Tensor probs_b = at::empty({shape.repeats, h, shape.panels, k, kPanel}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits_a.scalar_type(), "iic_joint_cpu", [&] {
    using A = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    const auto kernels = choose_kernels<scalar_t, A>();
    A* out = sums.mutable_data_ptr<A>();
    const bool single = chunks_of(shape) == 1;
    at::Tensor partials = single ? sums : at::empty({h, chunks_of(shape), k * k}, options);
    const cpu::JointTask<scalar_t, A> task{shape,
                                           logits_of<scalar_t>(logits_a),
                                           logits_of<scalar_t>(logits_b),
                                           probs_a.mutable_data_ptr<A>(),
                                           probs_b.mutable_data_ptr<A>(),
                                           partials.mutable_data_ptr<A>()};
    for_each_chunk(shape, [&](int64_t head, int64_t chunk) { kernels.joint(task, head, chunk); });
    if (!single) sum_chunks<A>(partials, out);
    out[h * k * k] = static_cast<A>(logits_b.size(0));
  });
  return {sums, probs_a, probs_b};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> iic_information_cpu(
    const at::Tensor& sums, int64_t k, double entropy_weight) {
  const int64_t num_heads = heads_of_sums(sums, k);
  at::Tensor terms[4];
  for (at::Tensor& term : terms) term = at::empty({num_heads}, sums.options());
  at::Tensor joint = at::empty({num_heads, k, k}, sums.options());
  at::Tensor joint_grad = at::empty_like(joint);
  AT_DISPATCH_FLOATING_TYPES(sums.scalar_type(), "iic_information_cpu", [&] {
    const auto kernels = choose_kernels<scalar_t, scalar_t>();
    const cpu::InformationTask<scalar_t> task{num_heads,
                                              k,
                                              static_cast<scalar_t>(entropy_weight),
                                              sums.const_data_ptr<scalar_t>(),
                                              terms[0].mutable_data_ptr<scalar_t>(),
                                              terms[1].mutable_data_ptr<scalar_t>(),
                                              terms[2].mutable_data_ptr<scalar_t>(),
                                              terms[3].mutable_data_ptr<scalar_t>(),
                                              joint.mutable_data_ptr<scalar_t>(),
                                              joint_grad.mutable_data_ptr<scalar_t>()};
    at::parallel_for(0, num_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) kernels.information(task, head);
    });
  });
  return {terms[0], terms[1], terms[2], terms[3], joint, joint_grad};
}

void check_kept(const char* name, const at::Tensor& kept, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(kept.sizes() == sizes && kept.scalar_type() == dtype && kept.is_contiguous(), name, " ",
                    kept.sizes(), " of ", kept.scalar_type(), ": must be a contiguous ", sizes, " of ", dtype,
                    ", as the ops before gave it for these logits");
}

std::tuple<at::Tensor, at::Tensor> iic_logits_grad_cpu(const at::Tensor& logits_a, const at::Tensor& logits_b,
                                                       const at::Tensor& probs_a, const at::Tensor& probs_b,
                                                       const at::Tensor& joint_grad,
                                                       const at::Tensor& grad_loss) {
  check_iic_logits(logits_a, logits_b);
  const cpu::Shape shape = shape_of(logits_a, logits_b);
  const int64_t h = shape.heads, k = shape.clusters;
  const at::ScalarType dtype = acc_type(logits_a);
  check_kept("probs_a", probs_a, {h, shape.panels, k, kPanel}, dtype);
  check_kept("probs_b", probs_b, {shape.repeats, h, shape.panels, k, kPanel}, dtype);
  check_kept("joint_grad", joint_grad, {h, k, k}, dtype);
  TORCH_CHECK_VALUE(grad_loss.dim() == 1 && grad_loss.size(0) == h && grad_loss.scalar_type() == dtype,
                    "grad_loss ", grad_loss.sizes(), " of ", grad_loss.scalar_type(), ": must be (H,) of ",
                    dtype);
  const auto options = logits_a.options().memory_format(at::MemoryFormat::Contiguous);
  at::Tensor grad_a = at::empty(logits_a.sizes(), options), grad_b = at::empty(logits_b.sizes(), options);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, logits_a.scalar_type(), "iic_logits_grad_cpu", [&] {
        using A = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
        const auto kernels = choose_kernels<scalar_t, A>();
        const cpu::LogitsGradTask<scalar_t, A> task{shape,
                                                    probs_a.const_data_ptr<A>(),
                                                    probs_b.const_data_ptr<A>(),
                                                    joint_grad.const_data_ptr<A>(),
                                                    grad_loss.const_data_ptr<A>(),
                                                    grad_loss.stride(0),
                                                    grad_a.mutable_data_ptr<scalar_t>(),
                                                    grad_b.mutable_data_ptr<scalar_t>()};
        for_each_chunk(shape, [&](int64_t head, int64_t chunk) { kernels.logits_grad(task, head, chunk); });
      });
  return {grad_a, grad_b};
}

}  // namespace

TORCH_LIBRARY_IMPL(iic_dist, CPU, m) {
  m.impl("iic_joint", &iic_joint_cpu);
  m.impl("iic_information", &iic_information_cpu);
  m.impl("iic_logits_grad", &iic_logits_grad_cpu);
}

}  // namespace iic_dist
