"""The kernels in Pallas's Triton backend, for GPUs from compute capability 8.0 on: all of them but Hopper's product.

`few_rows.py` is the whole product for few rows. For many rows `outliers.py` finds the outlier columns,
`quantize_rows.py` quantizes x and gathers those columns, and `many_rows.py` multiplies. `_pallas.py` is the one file
that touches JAX's Triton interface.
"""
