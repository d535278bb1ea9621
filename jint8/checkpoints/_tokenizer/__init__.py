"""Tokenizers: read from Hugging Face directories and GGUF files, streamed decoding, chat templates.

`tokenizer.py` has the class that both readers (`huggingface.py`, `gguf.py`) make; the work is that of the package
`tokenizers`.
"""
