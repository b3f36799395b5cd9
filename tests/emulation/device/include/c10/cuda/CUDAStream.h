// In the place of torch's: one stream, which is empty whenever the host looks.
#pragma once

namespace c10::cuda {

inline const void* getCurrentCUDAStream() { return nullptr; }

}  // namespace c10::cuda
