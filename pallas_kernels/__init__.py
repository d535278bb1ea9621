"""Pallas GPU kernels for LLM.int8(): an int8 matrix product that keeps outliers precise. Plain arrays in and out.

The package imports jax and numpy and nothing else, never `jint8`: weights come as int8 arrays with float32 scales.

Where to start reading: `llm_int8_matmul` in `matmul.py` is the whole product. It calls, in this order,

- for few rows (decoding): `triton/few_rows.py`, one kernel that quantizes x and one that multiplies;
- for many rows: `triton/outliers.py` finds the outlier columns, `triton/quantize_rows.py` quantizes x and gathers those
  columns, `triton/many_rows.py` or, on Hopper, `mosaic/many_rows.py` multiplies.
- for weights whose features were smoothed and rotated: `triton/rotate_rows.py` quantizes x, any number of rows.

`_numerics.py` has the arithmetic that the kernels share; all that depends on the version of JAX is in each folder's
`_pallas.py`. `chips.py` and `configs.py` hold the tile sizes and what limits them. `nogpu.py` (compile without a GPU),
`machine_code.py` (what a step of a loop does) and `tune.py` are tools for working on the kernels.
"""

from pallas_kernels.chips import CHIPS as CHIPS
from pallas_kernels.chips import Chip as Chip
from pallas_kernels.chips import chip_for as chip_for
from pallas_kernels.chips import current_chip as current_chip
from pallas_kernels.configs import FEW_ROWS as FEW_ROWS
from pallas_kernels.configs import FewRowsConfig as FewRowsConfig
from pallas_kernels.configs import MosaicConfig as MosaicConfig
from pallas_kernels.configs import TritonConfig as TritonConfig
from pallas_kernels.configs import check_config as check_config
from pallas_kernels.configs import default_configs as default_configs
from pallas_kernels.matmul import int8_matmul_mixed as int8_matmul_mixed
from pallas_kernels.matmul import llm_int8_matmul as llm_int8_matmul
from pallas_kernels.matmul import pick_config as pick_config
from pallas_kernels.triton.few_rows import Planes as Planes
from pallas_kernels.triton.few_rows import int8_matmul_few_rows as int8_matmul_few_rows
from pallas_kernels.triton.few_rows import quantize_few_rows as quantize_few_rows
from pallas_kernels.triton.outliers import Outliers as Outliers
from pallas_kernels.triton.outliers import outlier_columns as outlier_columns
from pallas_kernels.triton.quantize_rows import QuantizedRows as QuantizedRows
from pallas_kernels.triton.quantize_rows import quantize_rows as quantize_rows
from pallas_kernels.triton.rotate_rows import ROTATED_BLOCKS as ROTATED_BLOCKS
from pallas_kernels.triton.rotate_rows import rotate_rows as rotate_rows
