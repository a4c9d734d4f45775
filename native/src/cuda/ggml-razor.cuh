#pragma once

// called by ggml-cuda.cu for GGML_OP_CUSTOM

struct ggml_tensor;
struct ggml_backend_cuda_context;

// return true if op is an operation of ggml-razor.h that the device supports
bool ggml_cuda_razor_supported(int device, const ggml_tensor * op);

bool ggml_cuda_razor(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
