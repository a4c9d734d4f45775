#pragma once

// what ggml-cuda.cu calls for GGML_OP_CUSTOM

struct ggml_tensor;
struct ggml_backend_cuda_context;

// one of the operations of ggml-razor.h
bool ggml_cuda_razor_supported(int device, const ggml_tensor * op);

bool ggml_cuda_razor(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
