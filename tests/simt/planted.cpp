// Runs the planted kernels on NumPy arrays: module.run(kernel, fault, in, out, ...).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

// clang-format off
#include "simt.h"
#include "planted_kernels.cuh"
#include "bindings.h"
// clang-format on

namespace py = pybind11;

namespace {

using Kernel = void (*)(const float*, float*, int);
struct Planted {
  const char* name;
  Kernel right, wrong;
};

#define PLANTED(name) {#name, name<false>, name<true>}
constexpr Planted kKernels[] = {
    PLANTED(block_sum),
    PLANTED(shift),
    PLANTED(same_table),
    PLANTED(swap_lanes),
    PLANTED(meet_by_shuffle),
    PLANTED(shuffle_from),
    PLANTED(outside_own_mask),
    PLANTED(early_return),
    PLANTED(many_masks),
    PLANTED(divergent_barrier),
    PLANTED(deadlock),
    PLANTED(load_outside),
    PLANTED(plain_load_outside),
    PLANTED(store_into_input),
    PLANTED(load_misaligned),
    PLANTED(plain_load_misaligned),
    PLANTED(shared_unwritten),
    PLANTED(shared_overflow),
    PLANTED(blocks_write),
    PLANTED(blocks_chain),
    PLANTED(blocks_ticket),
    PLANTED(static_reverse),
    PLANTED(round_trip),
    PLANTED(vote),
    PLANTED(copy_read_early),
    PLANTED(copy_wait_for_few),
    PLANTED(copy_empty_group),
    PLANTED(copy_uncommitted),
    PLANTED(copy_of_other_lane),
    PLANTED(copy_barrier_early),
    PLANTED(copy_over_other_lane),
    PLANTED(copy_over_unread),
    PLANTED(copy_over_store),
    PLANTED(copy_twice),
    PLANTED(copy_of_changed_source),
    PLANTED(copy_outside),
    PLANTED(copy_from_shared),
    PLANTED(copy_misaligned),
    PLANTED(copy_three_bytes),
    PLANTED(copy_of_outside),
    PLANTED(copy_at_exit),
    PLANTED(cluster_sum),
    PLANTED(cluster_exit),
    PLANTED(cluster_deadlock),
    PLANTED(cluster_arrival),
    PLANTED(cluster_rank),
    PLANTED(cluster_no_arrival),
    PLANTED(cluster_blocks),
    PLANTED(cluster_pointer),
};

using Array = py::array_t<float, py::array::c_style>;

void run(const std::string& name, bool fault, const Array& in, Array out, unsigned grid,
         unsigned block, size_t shared_bytes, bool watch) {
  const int n = static_cast<int>(in.size());
  const float* source = in.data();
  float* target = out.mutable_data();
  simt::unwatch_all();
  if (watch) {
    simt::watch("in", source, in.nbytes(), false);
    simt::watch("out", target, out.nbytes(), true);
  }
  for (const Planted& planted : kKernels) {
    if (planted.name != name) continue;
    const Kernel kernel = fault ? planted.wrong : planted.right;
    const bool clustered = name.rfind("cluster_", 0) == 0;
    simt::launch(
        grid, block, shared_bytes, [&] { kernel(source, target, n); },
        dim3(clustered ? kClusterSize : 1));
    return;
  }
  throw py::key_error(name);
}

void number(Array out, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
            unsigned block_y, unsigned block_z) {
  float* target = out.mutable_data();
  simt::unwatch_all();
  simt::watch("out", target, out.nbytes(), true);
  simt::launch({grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, 0,
               [&] { number_threads(target); });
}

}  // namespace

PYBIND11_MODULE(planted, module) {
  simt::bind(module);
  module.def("run", run, py::arg("name"), py::arg("fault"), py::arg("input"), py::arg("output"),
             py::arg("grid"), py::arg("block"), py::arg("shared_bytes"), py::arg("watch") = false);
  module.def("number", number);
}
