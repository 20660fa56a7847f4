// What the row operators would launch on a device, without launching it: the launchers of
// csrc/cuda over one that answers for the device from Python and records.
//
//   row_launches(forward=True, dtype=1, rows=4096, classes=1203, ..., device=device)
//
// `device` has multiprocessors, shared_bytes and has_clusters, and the methods
// blocks_per_multiprocessor(kernel, threads, shared_bytes) and
// clusters(kernel, threads, shared_bytes, size). A kernel's name is its symbol, as nvcc has it. A
// launch "fills" the device if the launcher has asked how many of its blocks run at once.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <set>
#include <stdexcept>
#include <string>

#include "simt.h"
//
#include "cuda/launch/row_launch.h"

namespace {

namespace py = pybind11;
using namespace disalign::cuda;

class Launcher {
 public:
  explicit Launcher(const py::object& device) : device_(device) {}

  Limits limits() const {
    return {device_.attr("multiprocessors").cast<int>(),
            device_.attr("shared_bytes").cast<size_t>(), device_.attr("has_clusters").cast<bool>()};
  }

  template <class Args>
  int blocks_per_multiprocessor(void (*kernel)(Args), int threads, size_t shared_bytes) {
    asked_.insert(name(kernel));
    return device_.attr("blocks_per_multiprocessor")(name(kernel), threads, shared_bytes)
        .template cast<int>();
  }

  template <class Args>
  int clusters(void (*kernel)(Args), const Shape& shape) {
    asked_.insert(name(kernel));
    return device_.attr("clusters")(name(kernel), shape.threads, shape.shared_bytes, shape.grid_y)
        .template cast<int>();
  }

  template <class Args>
  void launch(void (*kernel)(Args), const Shape& shape, const Args& args) {
    py::dict record;
    record["kernel"] = name(kernel);
    record["grid_x"] = shape.grid_x;
    record["grid_y"] = shape.grid_y;
    record["threads"] = shape.threads;
    record["shared_bytes"] = shape.shared_bytes;
    record["clustered"] = shape.clustered;
    record["fills"] = asked_.count(name(kernel)) > 0;
    add(args, record);
    launches_.append(record);
  }

  // Nothing reads or writes it.
  void* allocate(size_t bytes) {
    allocated_ += (bytes + 255) / 256 * 256;
    return reinterpret_cast<void*>(allocated_);
  }

  const py::list& launches() const { return launches_; }

 private:
  template <class Args>
  static std::string name(void (*kernel)(Args)) {
    Dl_info found;
    if (!dladdr(reinterpret_cast<void*>(kernel), &found) || !found.dli_sname)
      throw std::runtime_error("a kernel without a symbol");
    return found.dli_sname;
  }

  static void add(const RowArgs& args, py::dict& record) {
    record["lanes"] = args.lanes;
    record["period"] = args.period;
    record["tile_vectors"] = args.tile_vectors;
  }
  static void add(const FinishArgs& args, py::dict& record) {
    record["class_blocks"] = args.class_blocks;
  }

  py::object device_;
  py::list launches_;
  std::set<std::string> asked_;
  size_t allocated_ = 256;
};

py::list row_launches(bool forward, int dtype, int64_t rows, int64_t classes, bool calibrated,
                      bool class_gradients, bool grad_logits, const py::object& device) {
  Launcher launcher(device);
  void* const given = launcher.allocate(1);  // aligned, as torch's memory is
  RowArgs args;
  args.logits = given;
  args.outer = rows, args.classes = classes, args.outer_stride = classes;
  args.target = args.row_shift = args.row_sum = args.denominator = static_cast<double*>(given);
  args.reduction = disalign::kReduceMean;
  if (forward) args.reduced_loss = given;
  if (calibrated) args.scale = args.bias = args.confidence = given;
  if (class_gradients) {
    args.class_gradients = true;
    args.grad_scale = args.grad_bias = args.grad_confidence = given;
  }
  if (grad_logits) {
    args.grad_logits = launcher.allocate(1);
    args.grad_outer_stride = classes;
  }
  if (forward)
    launch_row_forward(launcher, static_cast<Dtype>(dtype), args);
  else
    launch_row_backward(launcher, static_cast<Dtype>(dtype), args);
  return launcher.launches();
}

}  // namespace

PYBIND11_MODULE(planner, module) {
  module.def("row_launches", row_launches, py::kw_only(), py::arg("forward"), py::arg("dtype"),
             py::arg("rows"), py::arg("classes"), py::arg("calibrated"), py::arg("class_gradients"),
             py::arg("grad_logits"), py::arg("device"));
}
