"""The types of saved values: torch's, and their names in safetensors files."""

from __future__ import annotations

import torch

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}

TORCH_TYPES = {name: dtype for dtype, name in DTYPES.items()}
