"""Files on disk: reads GGUF files and Hugging Face directories, writes int8 ones; tensors, configurations, tokenizers.

Tensors have Hugging Face's names, shapes and row order here whatever the format; parameters of a model are made of them
in `jint8._convert`. This package imports nothing else of jint8, and neither JAX nor Flax: values are NumPy arrays.

Start with `_checkpoint.py` (what every reader offers) and `_open.py` (which reader takes which path); then
`_safetensors.py`, `_gguf/checkpoint.py`, and for what `jint8.save` writes `_jint8.py`, `_huggingface.py`,
`_destination.py` (where, and what is there before) and `_directory.py`. `_source.py` reads files that others may
change. `_gguf/architectures.py` is the table to extend for a new model family.
"""

from jint8.checkpoints._checkpoint import Checkpoint as Checkpoint
from jint8.checkpoints._checkpoint import Groups as Groups
from jint8.checkpoints._checkpoint import TensorInfo as TensorInfo
from jint8.checkpoints._open import open_checkpoint as open_checkpoint
from jint8.checkpoints._tokenizer.stream import TextStream as TextStream
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer as Tokenizer
