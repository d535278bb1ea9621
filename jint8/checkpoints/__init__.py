"""Checkpoint readers: GGUF files and Hugging Face directories, their tensors, configurations and tokenizers."""

from jint8.checkpoints._checkpoint import Checkpoint as Checkpoint
from jint8.checkpoints._checkpoint import TensorInfo as TensorInfo
from jint8.checkpoints._open import open_checkpoint as open_checkpoint
from jint8.checkpoints._tokenizer.stream import TextStream as TextStream
from jint8.checkpoints._tokenizer.tokenizer import Tokenizer as Tokenizer
