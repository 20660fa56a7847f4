// What the upsampling operators launch where targets are class probabilities; as upsample_launch.h.
#pragma once

#include "cuda/kernels/soft_upsample_kernel.cuh"
#include "cuda/launch/upsample_launch.h"

namespace disalign::cuda {

// Calls body(Constant<Rows>{}) with the rows of a thread: fewer than for_rows', whose probabilities of
// some classes are registers too.
template <class Body>
void for_soft_rows(const UpsampleArgs& args, Body body) {
  if (band_rows(args) <= 2)
    body(std::integral_constant<int, 2>{});
  else
    body(std::integral_constant<int, 4>{});
}

template <class Launcher>
void launch_soft_upsample_forward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args) {
  for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    run_upsample_forward<T>(launcher, args, dtype, [&](UpsampleArgs& placed) {
      int64_t blocks = 0;
      for_soft_rows(placed, [&](auto of_thread) {
        constexpr int kRows = decltype(of_thread)::value;
        blocks = launch_upsample_outputs<T, kRows>(launcher, soft_upsample_forward_kernel<T, kRows>,
                                                   0, placed);
      });
      return blocks;
    });
  });
}

template <class Launcher>
void launch_soft_upsample_backward(Launcher& launcher, Dtype dtype, const UpsampleArgs& args) {
  for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    run_upsample_backward<T>(launcher, args, dtype, [&](UpsampleArgs& placed) {
      for_soft_rows(placed, [&](auto of_thread) {
        constexpr int kRows = decltype(of_thread)::value;
        launch_upsample_tiles<T, kRows>(launcher, soft_upsample_backward_kernel<T, kRows>, placed);
      });
    });
  });
}

}  // namespace disalign::cuda
