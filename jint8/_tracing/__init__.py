"""A model's code read by its jaxpr: which parameters it multiplies, and the same code run with int8 ones.

Start with `plan` (`jint8.plan`): `uses` tells it what a traced function does with each parameter, `interpreter` and
`control_flow` follow the function, and `views` keeps the account of axes. `substitute` runs code that was written for
float weights on `QTensor`s, which `rearrange` transposes, reshapes and slices.

Imports `_trees`, `_ops` and `_core`, and no Flax.
"""
