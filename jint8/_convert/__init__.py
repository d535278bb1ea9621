"""Between a checkpoint's tensors and a model's parameters, either way.

A checkpoint (`jint8.checkpoints`) has tensors under Hugging Face's names; a model (`jint8.models`) has parameters,
often made of several tensors and mostly in int8. May import those two, `_tracing`, `_trees`, `_ops` and `_core`.

Start with `targets.py` (what each parameter is made of, and whether it becomes int8), then `read_params.py`, which
reads all of them, and `read_parameter.py`, which reads one. They use `quantize_rows.py` (weights to int8 in NumPy, a
few rows at a time), `assemble.py` (from rows to arrays, on one device or sharded) and `settings.py` (what the caller
and `config.json` ask for). Formats of their own: `saved.py` (what `jint8.save` writes), `lora.py`, and what others
stored in int8: `int8_weights.py` reads it, `bitsandbytes.py`, `compressed_tensors.py`, `quark.py` and `torchao.py` have
their configurations, as `options.py`.
"""
