"""Products with an int8 weight.

Imports `jint8._core`, and is the only package that imports `pallas_kernels`; no flax. Start with `matmul`, which checks
its arguments, and `product`, which chooses a path: `xla/` (see there) or `gpu`. `activations` and `digits` say how
activations become int8 and what happens to outliers. `dot_general`, `einsum`, `ragged_dot` and `layers` bring other
products to the same two-dimensional one; `observe` watches activations; `export` writes programs for GPUs.
"""
