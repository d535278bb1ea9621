"""Parameter trees: names of their leaves, int8 and back, bytes, shardings.

Start with `params` (`jint8.quantize_params`). `paths` names leaves and matches patterns, `plan` holds which of them are
multiplied and over which axes, `memory` weighs a tree, `sharding` places it on a mesh. `flax_state` alone imports Flax,
whose serialization it teaches `QTensor`.

Imports `_core`.
"""
