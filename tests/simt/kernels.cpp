// The kernels of csrc/cuda on NumPy arrays, without torch, so that they also run under the
// sanitizers: everything from the division of the work to the kernels, over a launcher of simt.
//
//   row_forward({"dtype": 1, "logits": z, "outer": 5, "target": t, ...})
//
// A key is a member of the arguments' struct; an array gives its address, and must have the type
// that the kernels expect. What is of the logits' size is watched: its traffic is counted.
#include <pybind11/numpy.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "simt.h"
//
#include "bindings.h"
#include "cuda/launch/launches.h"

namespace {

namespace py = pybind11;
using namespace disalign::cuda;
using disalign::IndexType;

class HostLauncher final : public Launcher {
 public:
  using Launcher::Launcher;

  // Of exactly this size, so that the address sanitizer sees its end; NaN until written.
  void* allocate(size_t bytes) override {
    memory_.emplace_back(new unsigned char[bytes ? bytes : 1]);
    std::memset(memory_.back().get(), 0xff, bytes);
    return memory_.back().get();
  }

 private:
  std::vector<std::unique_ptr<unsigned char[]>> memory_;
};

class Fields {
 public:
  explicit Fields(const py::dict& fields) : fields_(fields) {}

  template <class N>
  void number(const char* name, N& to) const {
    if (fields_.contains(name)) to = fields_[name].cast<N>();
  }
  template <class P>
  void array(const char* name, P*& to) const {
    if (!fields_.contains(name)) return;
    const auto found = fields_[name].cast<py::array>();
    to = static_cast<P*>(const_cast<void*>(found.data()));
    const std::string which = name;
    if (which == "logits" || which == "grad_logits" || which == "grad_output" ||
        which == "output" || which == "probabilities")
      simt::watch(name, found.data(), found.nbytes(), which == "grad_logits" || which == "output");
  }
  int integer(const char* name) const { return fields_[name].cast<int>(); }

 private:
  const py::dict& fields_;
};

#define DISALIGN_NUMBER(member) fields.number(#member, args.member)
#define DISALIGN_ARRAY(member) fields.array(#member, args.member)

void fill(const Fields& fields, disalign::LossArgs& args) {
  simt::unwatch_all();
  DISALIGN_NUMBER(outer), DISALIGN_NUMBER(classes), DISALIGN_NUMBER(inner);
  DISALIGN_NUMBER(outer_stride), DISALIGN_NUMBER(class_stride);
  DISALIGN_NUMBER(grad_outer_stride), DISALIGN_NUMBER(grad_class_stride);
  DISALIGN_NUMBER(ignore_index), DISALIGN_NUMBER(label_smoothing), DISALIGN_NUMBER(focal_gamma);
  DISALIGN_NUMBER(reduction), DISALIGN_NUMBER(normalizer), DISALIGN_NUMBER(upstream_stride);
  DISALIGN_NUMBER(class_gradients), DISALIGN_NUMBER(gradient_made);
  DISALIGN_NUMBER(probabilities_of_a), DISALIGN_NUMBER(keep), DISALIGN_NUMBER(share);
  DISALIGN_NUMBER(probability_outer_stride), DISALIGN_NUMBER(probability_class_stride);
  args.target_type = static_cast<IndexType>(fields.integer("target_type"));
  DISALIGN_ARRAY(logits), DISALIGN_ARRAY(target), DISALIGN_ARRAY(weight), DISALIGN_ARRAY(scale);
  DISALIGN_ARRAY(bias), DISALIGN_ARRAY(prior), DISALIGN_ARRAY(margin), DISALIGN_ARRAY(confidence);
  DISALIGN_ARRAY(sample_weight), DISALIGN_ARRAY(row_shift), DISALIGN_ARRAY(row_sum);
  DISALIGN_ARRAY(loss), DISALIGN_ARRAY(reduced_loss), DISALIGN_ARRAY(denominator);
  DISALIGN_ARRAY(given_denominator), DISALIGN_ARRAY(upstream), DISALIGN_ARRAY(grad_logits);
  DISALIGN_ARRAY(grad_scale), DISALIGN_ARRAY(grad_bias), DISALIGN_ARRAY(grad_confidence);
  DISALIGN_ARRAY(probabilities), DISALIGN_ARRAY(row_total), DISALIGN_ARRAY(prediction);
  DISALIGN_ARRAY(entropy), DISALIGN_ARRAY(shard_sums);
}

template <class Args>
void fill_rows(const Fields& fields, Args& args) {
  fill(fields, static_cast<disalign::LossArgs&>(args));
  DISALIGN_ARRAY(grad_output), DISALIGN_ARRAY(output);
}
void fill(const Fields& fields, RowArgs& args) { fill_rows(fields, args); }
void fill(const Fields& fields, DenseArgs& args) { fill_rows(fields, args); }

void fill(const Fields& fields, UpsampleArgs& args) {
  fill(fields, static_cast<disalign::LossArgs&>(args));
  fields.number("y_in", args.y.in), fields.number("y_out", args.y.out);
  fields.number("x_in", args.x.in), fields.number("x_out", args.x.out);
  DISALIGN_NUMBER(y_stride), DISALIGN_NUMBER(x_stride), DISALIGN_NUMBER(align_corners);
  DISALIGN_ARRAY(probability);
}

template <class Args>
using Run = void (*)(Launcher&, Dtype, const Args&);

template <class Args>
void define(py::module_& module, const char* name, Run<Args> run) {
  module.def(name, [run](const py::dict& given) {
    const Fields fields(given);
    Args args;
    fill(fields, args);
    Limits limits{2, 99 << 10};
    fields.number("multiprocessors", limits.multiprocessors);
    fields.number("shared_bytes", limits.shared_bytes);
    fields.number("has_clusters", limits.has_clusters);
    HostLauncher launcher(limits);
    run(launcher, static_cast<Dtype>(fields.integer("dtype")), args);
  });
}

}  // namespace

PYBIND11_MODULE(kernels, module) {
  simt::bind(module);
  define<RowArgs>(module, "row_forward", launch_row_forward);
  define<RowArgs>(module, "row_backward", launch_row_backward);
  define<DenseArgs>(module, "dense_forward", launch_dense_forward);
  define<DenseArgs>(module, "dense_backward", launch_dense_backward);
  define<RowArgs>(module, "row_calibrate", launch_calibrate_forward);
  define<RowArgs>(module, "row_calibrate_backward", launch_calibrate_backward);
  define<DenseArgs>(module, "dense_calibrate", launch_calibrate_forward);
  define<DenseArgs>(module, "dense_calibrate_backward", launch_calibrate_backward);
  define<UpsampleArgs>(module, "upsample_forward", launch_upsample_forward);
  define<UpsampleArgs>(module, "upsample_backward", launch_upsample_backward);
  define<RowArgs>(module, "soft_row_forward", launch_soft_row_forward);
  define<RowArgs>(module, "soft_row_backward", launch_soft_row_backward);
  define<DenseArgs>(module, "soft_dense_forward", launch_soft_dense_forward);
  define<DenseArgs>(module, "soft_dense_backward", launch_soft_dense_backward);
  define<UpsampleArgs>(module, "soft_upsample_forward", launch_soft_upsample_forward);
  define<UpsampleArgs>(module, "soft_upsample_backward", launch_soft_upsample_backward);
}
