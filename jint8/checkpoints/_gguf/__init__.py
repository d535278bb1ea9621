"""GGUF files (llama.cpp's format), read as if they were Hugging Face checkpoints.

`header.py` parses the file, `architectures.py` is the table of what each architecture calls and stores differently,
`names.py` and `config.py` translate by that table, `checkpoint.py` puts them together and reads values.
"""
