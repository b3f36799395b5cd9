// The whole IIC loss of a batch that no other rank shares, with its gradient: the three ops of iic.h in one call. At
// 256 x 10 the calls are what it costs: an autograd function in Python takes as long as both kernels.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace iic_dist {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

struct IICLoss : torch::autograd::Function<IICLoss> {
  static variable_list forward(AutogradContext* context, const Tensor& logits_a, const Tensor& logits_b,
                               double entropy_weight) {
    using Three = std::tuple<Tensor, Tensor, Tensor>;
    using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
    static const auto joint_op = find_op<Three(const Tensor&, const Tensor&)>("iic_dist::iic_joint");
    static const auto information_op = find_op<Six(const Tensor&, int64_t, double)>("iic_dist::iic_information");
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [sums, probs_a, probs_b] = joint_op.call(logits_a, logits_b);
    auto [loss, information, entropy, conditional, joint, joint_grad] =
        information_op.call(sums, logits_a.size(2), entropy_weight);
    context->save_for_backward({logits_a, logits_b, probs_a, probs_b, joint_grad});
    context->mark_non_differentiable({information, entropy, conditional, joint});
    context->set_materialize_grads(false);  // else the joint's would be a matrix of zeros
    return {loss, information, entropy, conditional, joint};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    using Two = std::tuple<Tensor, Tensor>;
    static const auto grad_op = find_op<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            const Tensor&)>("iic_dist::iic_logits_grad");
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    const auto saved = context->get_saved_variables();
    auto [grad_a, grad_b] = grad_op.call(saved[0], saved[1], saved[2], saved[3], saved[4], grads[0]);
    return {grad_a, grad_b, Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> iic_loss(const Tensor& logits_a, const Tensor& logits_b,
                                                            double entropy_weight) {
  const auto terms = IICLoss::apply(logits_a, logits_b, entropy_weight);
  return {terms[0], terms[1], terms[2], terms[3], terms[4]};
}

}  // namespace

TORCH_LIBRARY_IMPL(iic_dist, CompositeImplicitAutograd, m) { m.impl("iic_loss", &iic_loss); }

}  // namespace iic_dist
