"""What a family is: how its configuration reads, and how its tensors are called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from jint8.models._config import ModelConfig
from jint8.models.families._fields import Fields

COLUMNS, HEADS = "columns", "heads"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How checkpoints of one `model_type` say what `ModelConfig` says.

    Attributes:
      config: from the content of `config.json` to a `ModelConfig`.
      modules: from our module, or parameter, to their modules, whose tensors are stacked above each other. `{i}` stands
        for the number of a layer, `{e}` for that of each expert in turn.
      prefixes: what may stand in front of all names but the output head's, the usual one first.
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
