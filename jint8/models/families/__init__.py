"""The families of decoders: one file each, or one for those that share their names."""

from jint8.models.families._family import Family as Family
from jint8.models.families._layout import Source as Source
from jint8.models.families._layout import split as split
from jint8.models.families._layout import split_sizes as split_sizes
from jint8.models.families._registry import ENCODERS as ENCODERS
from jint8.models.families._registry import FAMILIES as FAMILIES
from jint8.models.families._registry import HEAD as HEAD
from jint8.models.families._registry import encoder_config as encoder_config
from jint8.models.families._registry import family as family
from jint8.models.families._registry import ignored as ignored
from jint8.models.families._registry import model_config as model_config
from jint8.models.families._registry import sources as sources
from jint8.models.families._registry import text_config as text_config
