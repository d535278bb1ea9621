"""GGUF files: their header, the names and types of tensors, and the configuration that they hold."""
