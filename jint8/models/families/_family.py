"""What a family is: how its configuration reads, and what its tensors are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from jint8.models._config import ModelConfig
from jint8.models.families._fields import Fields

# How a checkpoint stores a weight, where that isn't as rows `[n, k]` of the projections above each other.
COLUMNS, HEADS = "columns", "heads"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How checkpoints of one `model_type` say what `ModelConfig` says.

    Attributes:
      config: from the content of `config.json` to a `ModelConfig`.
      modules: from a module (or parameter) of `Decoder` to the checkpoint's modules, whose tensors, stacked above each
        other, make it up. `{i}` stands for the number of a layer, `{e}` for that of each expert in turn.
      prefixes: what may stand in front of all names but the output head's: checkpoints of the model without its head
        lack it. The usual one first.
      layouts: of modules whose weights aren't stored as rows `[n, k]`, queries above keys above values, the gate above
        the other factor: `COLUMNS` is `[k, n]`; `HEADS` has each head's query, key and value rows next to each other,
        as the decoder has them.
      unused: patterns of tensors that aren't parameters, such as masks.
      encoder: for `jint8.load_encoder`; the others are decoders.
    """

    config: Callable[[Fields], ModelConfig]
    modules: Mapping[str, str | tuple[str, ...]]
    prefixes: tuple[str, ...] = ("model.", "")
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    encoder: bool = False
