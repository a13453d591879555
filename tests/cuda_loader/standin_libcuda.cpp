// A libcuda for tests: it does nothing but write down what it is asked, in the types of NVIDIA's own cuda.h, so that
// the structures, constants and signatures which Python declares by hand are checked against the real ones.
#include <cuda.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

namespace {
std::mutex guard;
std::string record, failing, layout;
int failure = 0;
thread_local CUcontext current = nullptr;
thread_local CUstreamCaptureMode capture = CU_STREAM_CAPTURE_MODE_GLOBAL;

CUresult note(const char* name, const std::string& text) {
  std::lock_guard<std::mutex> lock(guard);
  record += std::string(name) + " " + text + "\n";
  return failing == name ? static_cast<CUresult>(failure) : CUDA_SUCCESS;
}

std::string number(long long value) { return std::to_string(value); }

std::string type_name(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return "uint8";
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
      return "int32";
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
      return "int64";
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
      return "float16";
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return "float32";
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return "float64";
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return "bfloat16";
    default:
      return "another type";
  }
}

int swizzle_bytes(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      return 0;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return -1;
  }
}

// Parameters as `layout` says: q int64, f float, M a tensor map of which the first number is shown.
std::string parameters(void** pointers) {
  std::string text;
  for (size_t i = 0; i < layout.size(); ++i) {
    int64_t integer = 0;
    float real = 0;
    if (layout[i] == 'f') {
      std::memcpy(&real, pointers[i], sizeof real);
      char digits[32];
      std::snprintf(digits, sizeof digits, "%.9g", real);
      text += std::string(" ") + digits;
    } else {
      std::memcpy(&integer, pointers[i], sizeof integer);
      text += (layout[i] == 'M' ? " map" : " ") + number(integer);
    }
  }
  return text;
}
}  // namespace

extern "C" {
const char* standin_record() { return record.c_str(); }
void standin_reset(const char* parameter_layout) {
  record.clear();
  failing.clear();
  layout = parameter_layout;
}
void standin_fail(const char* function, int status) {
  failing = function;
  failure = status;
}

CUresult CUDAAPI cuInit(unsigned int flags) { return note("cuInit", number(flags)); }
CUresult CUDAAPI cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal + 100;
  return note("cuDeviceGet", number(ordinal));
}
CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  if (device < 100) return CUDA_ERROR_INVALID_DEVICE;
  *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR            ? 9
           : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR          ? 0
           : which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 200000
                                                                            : -1;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(static_cast<intptr_t>(device) * 16);
  return note("cuDevicePrimaryCtxRetain", number(device));
}
CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxPushCurrent(CUcontext context) {
  current = context;
  return note("cuCtxPushCurrent", number(reinterpret_cast<intptr_t>(context)));
}
CUresult CUDAAPI cuCtxPopCurrent(CUcontext* context) {
  *context = current;
  current = nullptr;
  return note("cuCtxPopCurrent", "");
}
CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  std::swap(*mode, capture);
  return note("cuThreadExchangeStreamCaptureMode", number(capture));
}
CUresult CUDAAPI cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int count, CUjit_option* options,
                                    void** values) {
  *module = reinterpret_cast<CUmodule>(intptr_t(0x77));
  for (unsigned int i = 0; i < count; ++i) {
    const size_t bytes = i + 1 < count ? reinterpret_cast<size_t>(values[i + 1]) : 0;
    if (options[i] == CU_JIT_ERROR_LOG_BUFFER && options[i + 1] == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
      std::snprintf(static_cast<char*>(values[i]), bytes, "log of the driver");
  }
  const std::string mode = capture == CU_STREAM_CAPTURE_MODE_RELAXED ? " relaxed" : " strict";
  return note("cuModuleLoadDataEx",
              std::string(static_cast<const char*>(image), 4) + mode + (current ? "" : " without context"));
}
CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = reinterpret_cast<CUfunction>(intptr_t(0x99));
  return note("cuModuleGetFunction", number(reinterpret_cast<intptr_t>(module)) + " " + name);
}
CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  return note("cuFuncSetAttribute", number(reinterpret_cast<intptr_t>(function)) + " " + number(value));
}
CUresult CUDAAPI cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** kernel_parameters,
                                  void** extra) {
  std::string text =
      number(config->gridDimX) + "," + number(config->gridDimY) + "," + number(config->gridDimZ) + " " +
      number(config->blockDimX) + "," + number(config->blockDimY) + "," + number(config->blockDimZ) + " shared " +
      number(config->sharedMemBytes) + " stream " + number(reinterpret_cast<intptr_t>(config->hStream)) + " function " +
      number(reinterpret_cast<intptr_t>(function)) + " context " + number(reinterpret_cast<intptr_t>(current));
  for (unsigned int i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      text += " cluster " + number(attribute.value.clusterDim.x) + "," + number(attribute.value.clusterDim.y) + "," +
              number(attribute.value.clusterDim.z);
  }
  return note("cuLaunchKernelEx", text + (extra ? " extra" : "") + " with" + parameters(kernel_parameters));
}
CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                        const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box,
                                        const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                        CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                        CUtensorMapFloatOOBfill fill) {
  std::string text = type_name(type) + " rank " + number(rank) + " base " + number(reinterpret_cast<intptr_t>(base));
  for (cuuint32_t i = 0; i < rank; ++i)
    text += " [" + number(shape[i]) + " " + (i ? number(strides[i - 1]) : "-") + " " + number(box[i]) + " " +
            number(steps[i]) + "]";
  text += " swizzle " + number(swizzle_bytes(swizzle));
  if (reinterpret_cast<intptr_t>(map) % 64) text += " misaligned";
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) text += " wrong";
  std::memset(map, 0, sizeof *map);
  map->opaque[0] = 4242;
  return note("cuTensorMapEncodeTiled", text);
}
}
