// What the row operators launch, without a GPU: reads problems, a line each, and prints the kernels
// with their grids and the bytes of their arguments. rows.py calls it.
#include "simt.h"
//
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "cuda/launch/row_launch.h"

namespace {

using namespace disalign::cuda;

// Addresses that nothing reads but the walk over the machine code; all aligned.
template <class P>
P* pointer(int n) {
  return reinterpret_cast<P*>((uintptr_t{0x700} + n) << 32);
}

struct Device {
  Limits limits;
  // Of a multiprocessor. A block takes kReserved bytes more than it asks for.
  int shared_bytes, warps, blocks;
  static constexpr int kReserved = 1 << 10, kRegisters = 64 << 10;
};

class Launcher {
 public:
  Launcher(const Device& device, int registers) : device_(device), registers_(registers) {}

  Limits limits() const { return device_.limits; }
  // As CUDA's occupancy calculator has it.
  template <class Args>
  int blocks_per_multiprocessor(void (*)(Args), int threads, size_t shared_bytes) const {
    const int warps = threads / 32;
    const int of_warp = static_cast<int>(divide_up(registers_, 8)) * 256;
    const int by_registers = 4 * (Device::kRegisters / 4 / of_warp) / warps;
    const int64_t shared = divide_up(shared_bytes + Device::kReserved, 128) * 128;
    const int by_shared = static_cast<int>(device_.shared_bytes / shared);
    return std::min({by_registers, by_shared, device_.warps / warps, device_.blocks});
  }
  template <class Args>
  int clusters(void (*kernel)(Args), const Shape& shape) const {
    if (!device_.limits.has_clusters) return 0;
    return blocks_per_multiprocessor(kernel, shape.threads, shape.shared_bytes) *
           device_.limits.multiprocessors / static_cast<int>(shape.grid_y);
  }
  void* allocate(size_t) { return pointer<void>(0x40 + allocated_++); }

  template <class Args>
  void launch(void (*kernel)(Args), const Shape& shape, const Args& args) const {
    Dl_info info;
    if (!dladdr(reinterpret_cast<void*>(kernel), &info) || !info.dli_sname) std::abort();
    char* name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
    std::printf("%s\t%s\t%d\t%d\t%d\t%d\t", info.dli_sname, name, static_cast<int>(shape.grid_x),
                static_cast<int>(shape.grid_y), shape.threads,
                static_cast<int>(shape.shared_bytes));
    std::free(name);
    unsigned char bytes[sizeof(Args)];
    std::memcpy(bytes, &args, sizeof(Args));
    for (const unsigned char byte : bytes) std::printf("%02x", byte);
    std::printf("\n");
  }

 private:
  Device device_;
  int registers_, allocated_ = 0;
};

}  // namespace

// A line: dtype (launch.h), rows, classes, step, registers of a thread; of the device
// multiprocessors, clusters, and a multiprocessor's shared memory, warps, blocks. After its launches
// an empty line.
int main() {
  int dtype, registers, has_clusters;
  long long rows, classes;
  char step[32];
  Device device;
  Limits& limits = device.limits;
  while (std::scanf("%d %lld %lld %31s %d %d %d %d %d %d", &dtype, &rows, &classes, step,
                    &registers, &limits.multiprocessors, &has_clusters, &device.shared_bytes,
                    &device.warps, &device.blocks) == 10) {
    limits.shared_bytes = static_cast<size_t>(device.shared_bytes - Device::kReserved);
    limits.has_clusters = has_clusters != 0;
    const std::string name = step;
    RowArgs args;
    args.logits = pointer<void>(1);
    args.outer = rows;
    args.classes = classes;
    args.outer_stride = args.grad_outer_stride = classes;
    args.target = pointer<void>(2);
    args.weight = pointer<void>(3);
    args.row_shift = pointer<void>(4);
    args.row_sum = pointer<void>(5);
    args.denominator = pointer<double>(6);
    args.reduction = disalign::kReduceMean;
    args.normalizer = disalign::kByWeights;
    if (name == "stage2" || name == "all") {
      args.scale = pointer<void>(7);
      args.bias = pointer<void>(8);
      args.confidence = pointer<void>(9);
      args.grad_scale = pointer<void>(10);
      args.grad_bias = pointer<void>(11);
      args.grad_confidence = pointer<void>(12);
      args.class_gradients = true;
    }
    if (name != "forward" && name != "stage2") args.grad_logits = pointer<void>(14);
    Launcher launcher(device, registers);
    if (name == "backward") {
      args.upstream = pointer<void>(13);
      launch_row_backward(launcher, static_cast<Dtype>(dtype), args);
    } else {
      args.reduced_loss = pointer<void>(15);
      launch_row_forward(launcher, static_cast<Dtype>(dtype), args);
    }
    std::printf("\n");
  }
}
