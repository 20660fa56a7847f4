#include "cuda/launch/finish_launch.h"
#include "cuda/launch/launches.h"

namespace disalign::cuda {

void finish(Launcher& launcher, Dtype dtype, FinishArgs args) {
  finish<Launcher>(launcher, dtype, args);
}

}  // namespace disalign::cuda
