"""NumPy's dtypes by the names that safetensors and GGUF share for values stored one by one, without blocks."""

import ml_dtypes
import numpy as np

# FP8 and the packed types of safetensors are left out on purpose: nothing above this package can use them. GGUF has
# some of these, and types that store blocks of values with a scale, which the gguf package dequantizes to float32.
DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16,
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
        "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
    }.items()
}  # fmt: skip
