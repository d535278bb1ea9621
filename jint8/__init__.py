"""LLM.int8() for JAX."""
