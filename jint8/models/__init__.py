"""The models' architectures: one decoder and one encoder in Flax linen, and how families of checkpoints map to them.

`ModelConfig` says in which of the choices that families make (norms, positions, residuals, ...) a model differs from
the next one. `Decoder` runs any of them, on float parameters or on int8 ones: whether a weight is a `QTensor` decides.

Imports `jint8._core`, `jint8._ops` and `jint8._trees`; nothing here reads files or generates text (see
`jint8.checkpoints`, `jint8._convert` and `jint8._inference`).

Start with `_config.py` and `_decoder.py`, then `_attention.py`, `_cache.py` and `_layers.py`. `families/` has a file
for each group of families, and says how to add one. `_fused.py` and `_partition.py` are about how weights lie and are
sharded.
"""

from jint8.models._attention import Context as Context
from jint8.models._attention import context as context
from jint8.models._cache import Int8Cache as Int8Cache
from jint8.models._cache import LayerCache as LayerCache
from jint8.models._cache import make_cache as make_cache
from jint8.models._config import ModelConfig as ModelConfig
from jint8.models._config import Rope as Rope
from jint8.models._decoder import Decoder as Decoder
from jint8.models._encoder import Encoder as Encoder
from jint8.models._partition import partition_specs as partition_specs
from jint8.models.families import ENCODERS as ENCODERS
from jint8.models.families import FAMILIES as FAMILIES
from jint8.models.families import encoder_config as encoder_config
from jint8.models.families import model_config as model_config
