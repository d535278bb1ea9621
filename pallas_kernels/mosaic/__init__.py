"""The product for many rows in Mosaic GPU, for Hopper (`many_rows.py`), on what the Triton kernels quantized.

`_pallas.py` has what depends on the version of JAX.
"""
