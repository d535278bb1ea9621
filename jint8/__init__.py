"""LLM.int8() for JAX."""

from jint8._plan import Plan, plan

__all__ = ["Plan", "plan"]
