"""Loaded models at work: from a path to a model that runs, and its text, vectors and scores; whether it fits.

May import everything but `jint8.cli` and `jint8.nnx`. Start with `load.py` and with what it returns,
`language_model.py` or `text_encoder.py`. Below these, `generation.py` makes tokens, by `by_layers.py` on a CPU and by
`generate.py` elsewhere; `forward.py` gives logits of whole sequences, `sampling.py` chooses the next token, `text.py`
turns tokens into text, `programs.py` keeps what was compiled. `load_four_bits.py` and
`layer_by_layer.py` calibrate and round weights of four bits. `evaluate.py` scores, `save.py` writes to disk.
`capacity.py` and `collectives.py` are `jint8 fit`'s: what programs would take and exchange, compiled without weights.
"""
