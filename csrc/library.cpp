// Every op schema, and what this binary is. csrc/cpu and csrc/cuda register the implementations.
#include <ATen/Version.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

TORCH_LIBRARY(iic_dist, m) {
  m.def("iic_joint(Tensor logits_a, Tensor logits_b) -> (Tensor sums, Tensor probs_a, Tensor probs_b)");
  m.def(
      "iic_information(Tensor sums, int num_clusters, float entropy_weight) -> (Tensor loss, Tensor "
      "mutual_information, "
      "Tensor entropy, Tensor conditional_entropy, Tensor joint, Tensor joint_grad)");
  m.def(
      "iic_logits_grad(Tensor logits_a, Tensor logits_b, Tensor probs_a, Tensor probs_b, Tensor joint_grad, "
      "Tensor grad_loss) -> (Tensor grad_a, Tensor grad_b)");
  m.def(
      "nt_xent_rows(Tensor z, int first_row, int num_rows, float temperature) -> (Tensor log_sum_exp, "
      "Tensor positive)");
  m.def(
      "nt_xent_rows_grad(Tensor z, Tensor log_sum_exp, int first_row, int num_rows, float temperature) -> "
      "Tensor grad");
  m.def(
      "augment_views(Tensor images, Tensor rows, Tensor parameters, int size, int blur_kernel, bool sobel, "
      "float[] mean, float[] std, ScalarType dtype, bool channels_last) -> Tensor views");
}

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
#ifdef IIC_DIST_CUDA
  info["cuda"] = C10_STRINGIZE(IIC_DIST_CUDA);
#else
  info["cuda"] = pybind11::none();
#endif
  info["compiler"] = __VERSION__;
  info["cpu_capability"] = at::get_cpu_capability();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &build_info,
        "What this extension was built for, and the instruction set it runs with here.");
}
