"""Decoder models in Flax linen."""

from jint8.models._config import FAMILIES as FAMILIES
from jint8.models._config import ModelConfig as ModelConfig
from jint8.models._config import model_config as model_config
from jint8.models._decoder import Context as Context
from jint8.models._decoder import Decoder as Decoder
from jint8.models._decoder import LayerCache as LayerCache
from jint8.models._decoder import context as context
from jint8.models._decoder import make_cache as make_cache
