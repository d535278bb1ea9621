"""Decoder models in Flax linen."""

from jint8.models._attention import Context as Context
from jint8.models._attention import LayerCache as LayerCache
from jint8.models._attention import context as context
from jint8.models._attention import make_cache as make_cache
from jint8.models._config import ModelConfig as ModelConfig
from jint8.models._config import Rope as Rope
from jint8.models._decoder import Decoder as Decoder
from jint8.models._encoder import Encoder as Encoder
from jint8.models._partition import partition_specs as partition_specs
from jint8.models.families import ENCODERS as ENCODERS
from jint8.models.families import FAMILIES as FAMILIES
from jint8.models.families import encoder_config as encoder_config
from jint8.models.families import model_config as model_config
