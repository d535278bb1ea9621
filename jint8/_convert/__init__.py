"""Between a checkpoint's tensors and a model's parameters, either way."""
