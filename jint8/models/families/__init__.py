"""Model families as data: how each one's config.json and tensor names read.

To add a family, write one file here whose `FAMILIES` maps its `model_type` to a `Family` (start from `_neox.py`; the
registry finds the file), and, for GGUF files, one entry in `jint8/checkpoints/_gguf/architectures.py`. An option of the
configuration that would change the result and isn't supported must be refused. Then make a fixture with
`tests/fixtures/make_families.py`, which the tests of all families pick up (CONTRIBUTING.md names the other tests).

- `_family.py`: what a `Family` is. `_fields.py`: fields of a config.json, checked.
- `_registry.py`: from a `model_type` to its family, from parameters to the tensors that they are made of.
- `_layout.py`: from tensors to the rows of parameters and back.
- the others: families that share their names.
"""

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
