"""Tokenizers: out of Hugging Face and GGUF files, streams of text, chat templates."""
