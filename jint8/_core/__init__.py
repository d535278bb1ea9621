"""What an int8 weight is, and the arithmetic between floats and int8.

Imports nothing else of the project, and no flax. Start with `config` (what can be asked for) and `qtensor` (what an
int8 weight is); then `quantize` and `rounding` (how its numbers come about), `outlier_rows` (its calibrated columns in
16 bits), `four_bits`, `grouping`, `moments`, `gptq` and `gptq_weight` (codes of four bits), `axes`, `platform` and
`static_fields` (its metadata as text).
"""
