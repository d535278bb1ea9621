"""A transformer block in int8: the user's own, or a standard one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from jint8._core.config import Config, check_config
from jint8._trees.left_out import say_left_out
from jint8.linen._registry import int8_layers


class Int8TransformerBlock(nn.Module):
    """Runs a transformer block with every projection in int8.

    With `block`, that module runs: anything made of standard and registered layers. Without, a block of attention and a
    two-layer MLP, with the norms in front of each (`norm="pre"`) or behind each sum (`norm="post"`):

        pre:  x = x + attention(norm(x));  x = x + mlp(norm(x))
        post: x = norm(x + attention(x));  x = norm(x + mlp(x))

    Kernels of standard layers in floating point are quantized at each call, with gradients straight through;
    `jint8.quantize_params` turns them into `QTensor`s once and for all. Embeddings, norms and convolutions stay as they
    are. A `UserWarning` says so where nothing is quantized.

    Attributes:
      block: the module to run; None for a standard block.
      num_heads: of the standard block.
      mlp_dim: width of its MLP; None: four times that of the input.
      norm: `"pre"` or `"post"`.
      activation: of its MLP.
      epsilon: of its layer norms.
      dtype: of its computation; None: what inputs and parameters promote to.
      config: how kernels in floating point are quantized; a `QTensor` brings its own.

    Raises:
      ValueError: neither `block` nor `num_heads`, or an unknown `norm`; from the call.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> block, x = jint8.linen.Int8TransformerBlock(num_heads=2), jnp.ones((1, 3, 8))
      >>> params = block.init(jax.random.key(0), x)
      >>> block.apply(jint8.quantize_params(params), x).shape
      (1, 3, 8)
    """

    block: nn.Module | None = None
    num_heads: int | None = None
    mlp_dim: int | None = None
    norm: str = "pre"
    activation: Callable[[jax.Array], jax.Array] = nn.gelu
    epsilon: float = 1e-6
    dtype: DTypeLike | None = None
    config: Config = Config()

    @nn.compact
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """The block's result.

        Args:
          x: `[batch, length, features]` for the standard block.
          *args: the mask for the standard block, if any; for a block of yours, its own arguments.
          **kwargs: likewise.
        """
        check_config(self.config)
        with int8_layers(self.config) as ran:
            result = (self._standard if self.block is None else self.block)(x, *args, **kwargs)
        say_left_out(
            "jint8.linen.Int8TransformerBlock",
            {},
            "Teach jint8 its layers with jint8.linen.register, or quantize its weights with jint8.quantize_params.",
            quantizes=bool(ran) or self.is_initializing() or not self.config.quantizes_weights,
            nothing=f"no layer of {type(self.block).__name__} is a standard one or has an int8 weight",
        )
        return result

    def _standard(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        if self.num_heads is None:
            raise ValueError("Expected a block, or num_heads of a standard one, got neither.")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"Expected norm to be pre or post, got {self.norm!r}.")
        features = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(self.num_heads, dtype=self.dtype, name="attention")
        up = nn.Dense(self.mlp_dim or 4 * features, dtype=self.dtype, name="up")
        down = nn.Dense(features, dtype=self.dtype, name="down")
        norms = [nn.LayerNorm(self.epsilon, dtype=self.dtype, name=name) for name in ("norm_attention", "norm_mlp")]
        parts = (lambda x: attention(x, x, mask=mask)), (lambda x: down(self.activation(up(x))))
        for norm, part in zip(norms, parts, strict=True):
            x = x + part(norm(x)) if self.norm == "pre" else norm(x + part(x))
        return x
