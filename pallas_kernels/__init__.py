"""Pallas GPU kernels for LLM.int8(): plain arrays in, plain arrays out."""
