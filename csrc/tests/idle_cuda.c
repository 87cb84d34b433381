// A CUDA driver that accepts everything and does nothing: what Triton's launcher needs of libcuda.so.1 to be run,
// timed and listened to where there is no GPU. Pointers are taken as they are, so CPU tensors pass.

#include <cuda.h>
#include <stdint.h>
#include <string.h>

#define MOST_PARAMETERS 256

static long launches;
static unsigned shape[5];
static int sizes[MOST_PARAMETERS], parameters;
static uint64_t values[MOST_PARAMETERS];

// Bytes of each parameter of the launches to come, so that their values can be read back.
void idle_expect(const int *bytes, int count) {
    parameters = count;
    memcpy(sizes, bytes, (size_t)count * sizeof(int));
}

// Launches so far; of the latest one grid (3), threads and shared memory, and its parameters' bits.
long idle_latest(unsigned *latest_shape, uint64_t *latest_values) {
    memcpy(latest_shape, shape, sizeof(shape));
    memcpy(latest_values, values, (size_t)parameters * sizeof(uint64_t));
    return launches;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    (void)function, (void)extra;
    launches++;
    shape[0] = config->gridDimX, shape[1] = config->gridDimY, shape[2] = config->gridDimZ;
    shape[3] = config->blockDimX, shape[4] = config->sharedMemBytes;
    for (int i = 0; i < parameters; i++) {
        values[i] = 0;
        memcpy(&values[i], arguments[i], (size_t)sizes[i]);
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    (void)attribute;
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    default: *value = 232448; // of Hopper's attributes only the shared memory of a block matters to Triton
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    (void)function;
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int index) { return *device = index, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return (void)device, *context = (CUcontext)1, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return (void)limit, *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return (void)function, (void)attribute, (void)value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    return (void)function, (void)config, CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    return (void)image, *module = (CUmodule)1, CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return (void)module, (void)name, *function = (CUfunction)1, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return (void)stream, *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char **text) {
    return (void)error, *text = "an error of the idle driver", CUDA_SUCCESS;
}
