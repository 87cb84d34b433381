// SPDX-License-Identifier: Apache-2.0
//
// Stands in for the CUDA runtime where there is no GPU: two devices that run nothing, and a record of every launch as
// "kernel device stream blocks threads shared", with the bytes of its parameter where their number was told. Linked with
// the objects that nvcc makes, so that what the host code asks of the runtime can be tested, and the launches modelled.
#include <cstddef>
#include <cstdint>
#include <map>
#include <sstream>
#include <string>

namespace {

struct Extent {
  unsigned x, y, z;
};

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

std::map<std::string, size_t>& parameter_sizes() {
  static std::map<std::string, size_t> sizes;
  return sizes;
}

std::string record;
int device = 0, failing = 0;

}  // namespace

extern "C" {

const char* recorded() { return record.c_str(); }
void tell_parameter_size(const char* kernel, size_t bytes) { parameter_sizes()[kernel] = bytes; }
int recorded_device() { return device; }
void forget(int error_of_launches) {
  record.clear();
  failing = error_of_launches;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = name;
}
int __cudaGetKernel(void**, const void*) { return 1; }
int __cudaLaunchKernel(void*, Extent, Extent, void**, size_t, void*) { return 1; }
unsigned __cudaPopCallConfiguration(Extent*, Extent*, size_t*, void*) { return 1; }

const char* cudaGetErrorName(int error) { return error == 101 ? "cudaErrorInvalidDevice" : "cudaErrorRecorded"; }
const char* cudaGetErrorString(int error) { return error == 101 ? "invalid device ordinal" : "asked to fail"; }
int cudaGetLastError() { return 0; }
int cudaGetDevice(int* current) {
  *current = device;
  return 0;
}
int cudaSetDevice(int wanted) {
  if (wanted < 0 || wanted > 1) return 101;
  device = wanted;
  return 0;
}
int cudaFuncGetAttributes(void*, const void* function) { return kernels().count(function) ? 0 : 98; }

int cudaLaunchKernel(const void* function, Extent blocks, Extent threads, void** arguments, size_t shared,
                     void* stream) {
  if (failing) return failing;
  std::ostringstream line;
  line << kernels()[function] << ' ' << device << ' ' << reinterpret_cast<uintptr_t>(stream) << ' ' << blocks.x << ' '
       << threads.x << ' ' << shared;
  const auto size = parameter_sizes().find(kernels()[function]);
  if (size != parameter_sizes().end()) {
    const auto* bytes = static_cast<const unsigned char*>(arguments[0]);
    line << ' ';
    for (size_t at = 0; at < size->second; ++at) line << "0123456789abcdef"[bytes[at] >> 4] << "0123456789abcdef"[bytes[at] & 15];
  }
  line << '\n';
  record += line.str();
  return 0;
}

}  // extern "C"
