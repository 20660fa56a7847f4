// What the loss operators would launch on a device, without launching it: the launchers of
// csrc/cuda over one that answers for the device from Python and records.
//
//   row_launches(forward=True, dtype=1, rows=4096, classes=1203, ..., device=device)
//   row_launches(..., probabilities=1, ...)  # as targets: 1, of the logits' type; 2, of the arithmetic
//   row_launches(..., made=True, ...)  # backward where forward has made the gradient of the logits
//   row_launches(..., padding=13, grad_padding=13, ...)  # elements between rows, and between gradients'
//   dense_launches(forward=True, dtype=1, images=2, classes=150, positions=262144, ...)
//   upsample_launches(forward=True, dtype=1, images=2, classes=150, low=(64, 64), size=(512, 512), ...)
//
// A dict a launch: kernel (its symbol, as nvcc has it), declaration, arguments (their bytes, of
// addresses that nothing reads, all aligned; TARGETS is that of the targets), grid, and more.
//
// `device` has multiprocessors, shared_bytes and has_clusters, and the methods
// blocks_per_multiprocessor(kernel, threads, shared_bytes) and
// clusters(kernel, threads, shared_bytes, size). A launch "fills" the device if the launcher has
// asked how many of its blocks run at once.
#include <cxxabi.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "simt.h"
//
#include "cuda/launch/dense_launch.h"
#include "cuda/launch/row_launch.h"
#include "cuda/launch/soft_row_launch.h"
#include "cuda/launch/upsample_launch.h"

namespace {

namespace py = pybind11;
using namespace disalign::cuda;

// Of the first memory; that of each further one is 4 GiB on.
constexpr uintptr_t kFirst = uintptr_t{0x700} << 32;

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
    record["declaration"] = demangled(name(kernel));
    record["arguments"] = py::bytes(reinterpret_cast<const char*>(&args), sizeof(Args));
    record["grid_x"] = shape.grid_x;
    record["grid_y"] = shape.grid_y;
    record["threads"] = shape.threads;
    record["shared_bytes"] = shape.shared_bytes;
    record["clustered"] = shape.clustered;
    record["fills"] = asked_.count(name(kernel)) > 0;
    add(args, record);
    launches_.append(record);
  }

  void* allocate(size_t) { return reinterpret_cast<void*>(kFirst + (allocated_++ << 32)); }

  const py::list& launches() const { return launches_; }

 private:
  template <class Args>
  static std::string name(void (*kernel)(Args)) {
    Dl_info found;
    if (!dladdr(reinterpret_cast<void*>(kernel), &found) || !found.dli_sname)
      throw std::runtime_error("a kernel without a symbol");
    return found.dli_sname;
  }

  static std::string demangled(const std::string& symbol) {
    const std::unique_ptr<char, decltype(&std::free)> found(
        abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, nullptr), std::free);
    return found.get();
  }

  static void add(const RowArgs& args, py::dict& record) {
    record["lanes"] = args.lanes;
    record["period"] = args.period;
    record["tile_vectors"] = args.tile_vectors;
    record["row_tiles"] = args.tiles;
  }
  static void add(const DenseArgs& args, py::dict& record) {
    record["lane_bits"] = args.lane_bits;
    record["rounds"] = args.rounds;
    record["chunks"] = args.chunks;
    record["tiles"] = args.outer * int64_t{args.image_tiles};
    record["image_tiles_at"] =
        reinterpret_cast<const char*>(&args.image_tiles) - reinterpret_cast<const char*>(&args);
  }
  static void add(const DivisorArgs&, py::dict&) {}
  static void add(const FinishArgs& args, py::dict& record) {
    record["class_blocks"] = args.class_blocks;
    record["class_grid"] = args.class_grid;
  }

  // Addresses of what upsample_axis_kernel fills, for the rows and for the columns.
  static void add(const UpsampleArgs& args, py::dict& record) {
    const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    record["tiles"] = args.tiles_down * args.tiles_across;
    record["source"] = py::make_tuple(address(args.y.source), address(args.x.source));
    record["first"] = py::make_tuple(address(args.y.first), address(args.x.first));
  }

  py::object device_;
  py::list launches_;
  std::set<std::string> asked_;
  uintptr_t allocated_ = 0;
};

// The options that every layout has.
struct Step {
  bool forward, weighted, calibrated, class_gradients, grad_logits;
};

template <class Args>
void set(Launcher& launcher, const Step& step, Args& args) {
  const auto memory = [&] { return launcher.allocate(0); };
  args.target = memory();  // the first
  args.logits = memory();
  args.row_shift = memory(), args.row_sum = memory();
  args.denominator = static_cast<double*>(memory());
  args.reduction = disalign::kReduceMean;
  if (step.weighted) args.weight = memory();
  if (step.calibrated) args.scale = memory(), args.bias = memory(), args.confidence = memory();
  if (step.class_gradients) {
    args.class_gradients = true;
    args.grad_scale = memory(), args.grad_bias = memory(), args.grad_confidence = memory();
  }
  if (step.grad_logits) args.grad_logits = memory();
  if (step.forward)
    args.reduced_loss = memory();
  else
    args.upstream = memory();
}

// What return_details="entropy" asks of the kernels.
template <class Args>
void set_details(Launcher& launcher, Args& args) {
  args.loss = launcher.allocate(0);
  args.prediction = static_cast<int64_t*>(launcher.allocate(0));
  args.entropy = launcher.allocate(0);
}

py::list row_launches(bool forward, int dtype, int64_t rows, int64_t classes, bool weighted,
                      bool calibrated, bool class_gradients, bool grad_logits,
                      const py::object& device, int probabilities, int64_t padding,
                      int64_t grad_padding, bool made, bool details) {
  Launcher launcher(device);
  RowArgs args;
  args.outer = rows, args.classes = classes;
  args.outer_stride = classes + padding, args.grad_outer_stride = classes + grad_padding;
  args.gradient_made = made;
  set(launcher, {forward, weighted, calibrated, class_gradients, grad_logits}, args);
  if (details) set_details(launcher, args);
  if (probabilities) {
    args.probabilities = launcher.allocate(0);
    args.probability_outer_stride = classes;
    args.probabilities_of_a = probabilities == 2 || dtype == static_cast<int>(Dtype::kFloat32);
    args.row_total = launcher.allocate(0);
    if (forward)
      launch_soft_row_forward(launcher, static_cast<Dtype>(dtype), args);
    else
      launch_soft_row_backward(launcher, static_cast<Dtype>(dtype), args);
  } else if (forward)
    launch_row_forward(launcher, static_cast<Dtype>(dtype), args);
  else
    launch_row_backward(launcher, static_cast<Dtype>(dtype), args);
  return launcher.launches();
}

py::list dense_launches(bool forward, int dtype, int64_t images, int64_t classes, int64_t positions,
                        bool weighted, bool calibrated, bool class_gradients, bool grad_logits,
                        const py::object& device) {
  Launcher launcher(device);
  DenseArgs args;
  args.outer = images, args.classes = classes, args.inner = positions;
  args.class_stride = args.grad_class_stride = positions;
  args.outer_stride = args.grad_outer_stride = classes * positions;
  set(launcher, {forward, weighted, calibrated, class_gradients, grad_logits}, args);
  if (forward)
    launch_dense_forward(launcher, static_cast<Dtype>(dtype), args);
  else
    launch_dense_backward(launcher, static_cast<Dtype>(dtype), args);
  return launcher.launches();
}

py::list upsample_launches(bool forward, int dtype, int64_t images, int64_t classes,
                           std::pair<int, int> low, std::pair<int, int> size, bool weighted,
                           bool calibrated, bool class_gradients, bool grad_logits,
                           const py::object& device) {
  Launcher launcher(device);
  UpsampleArgs args;
  args.outer = images, args.classes = classes, args.inner = int64_t{size.first} * size.second;
  args.y.in = low.first, args.x.in = low.second;
  args.y.out = size.first, args.x.out = size.second;
  args.x_stride = 1, args.y_stride = low.second;
  args.class_stride = int64_t{low.first} * low.second;
  args.outer_stride = classes * args.class_stride;
  set(launcher, {forward, weighted, calibrated, class_gradients, grad_logits}, args);
  if (forward)
    launch_upsample_forward(launcher, static_cast<Dtype>(dtype), args);
  else
    launch_upsample_backward(launcher, static_cast<Dtype>(dtype), args);
  return launcher.launches();
}

}  // namespace

PYBIND11_MODULE(planner, module) {
  module.def("row_launches", row_launches, py::kw_only(), py::arg("forward"), py::arg("dtype"),
             py::arg("rows"), py::arg("classes"), py::arg("weighted"), py::arg("calibrated"),
             py::arg("class_gradients"), py::arg("grad_logits"), py::arg("device"),
             py::arg("probabilities") = 0, py::arg("padding") = 0, py::arg("grad_padding") = 0,
             py::arg("made") = false, py::arg("details") = false);
  module.def("dense_launches", dense_launches, py::kw_only(), py::arg("forward"), py::arg("dtype"),
             py::arg("images"), py::arg("classes"), py::arg("positions"), py::arg("weighted"),
             py::arg("calibrated"), py::arg("class_gradients"), py::arg("grad_logits"),
             py::arg("device"));
  module.def("upsample_launches", upsample_launches, py::kw_only(), py::arg("forward"),
             py::arg("dtype"), py::arg("images"), py::arg("classes"), py::arg("low"),
             py::arg("size"), py::arg("weighted"), py::arg("calibrated"),
             py::arg("class_gradients"), py::arg("grad_logits"), py::arg("device"));
  module.attr("TARGETS") = kFirst;
}
