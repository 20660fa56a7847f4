// Whether code for some architectures runs on a device, asked by calls that need no context: one
// takes some hundred MiB, and a process that works on another device should not have it here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdlib>
#include <string>

namespace disalign::cuda {

struct Device {
  int capability = 0;       // 10 * major + minor
  bool integrated = false;  // of a system on a chip
  bool compiles = false;    // whether the driver knows the PTX of this runtime's version
};

// architectures: as CMake has them, "80-real,90a-real,120": "-real" is machine code alone, without
// it there is PTX too, which newer devices compile.
inline bool has_code_for(const std::string& architectures, const Device& device) {
  const char* at = architectures.c_str();
  while (*at != '\0') {
    char* number_end = nullptr;
    const int capability = static_cast<int>(std::strtol(at, &number_end, 10));
    const char *rest = number_end, *end = rest;
    while (*end != '\0' && *end != ',') ++end;
    const bool specific = *rest == 'a';  // its instructions are on this very architecture
    const bool ptx = std::string(rest, end).find("-real") == std::string::npos;
    if (device.capability == capability) return true;
    if (!specific && device.capability > capability) {
      // Machine code serves later minor versions, but not between chips of both kinds.
      if (device.capability / 10 == capability / 10 && !device.integrated) return true;
      if (ptx && device.compiles) return true;
    }
    at = *end == ',' ? end + 1 : end;
  }
  return false;
}

// Why code for these architectures cannot run on a device of this number; empty if it can.
inline std::string why_not(int device, const std::string& architectures) {
  int major = 0, minor = 0, integrated = 0, driver = 0, runtime = 0;
  // The first call fails where the driver is too old for this runtime, or there is no such device.
  cudaError_t status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&integrated, cudaDevAttrIntegrated, device);
  if (status == cudaSuccess) status = cudaDriverGetVersion(&driver);
  if (status == cudaSuccess) status = cudaRuntimeGetVersion(&runtime);
  if (status != cudaSuccess) {
    cudaGetLastError();  // the runtime's, not the caller's
    return cudaGetErrorString(status);
  }
  if (has_code_for(architectures, {10 * major + minor, integrated != 0, driver >= runtime}))
    return "";
  return "the device's compute capability is " + std::to_string(major) + "." +
         std::to_string(minor);
}

}  // namespace disalign::cuda
