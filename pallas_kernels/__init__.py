"""Pallas GPU kernels for LLM.int8(): plain arrays in, plain arrays out."""

from pallas_kernels.chips import CHIPS as CHIPS
from pallas_kernels.chips import Chip as Chip
from pallas_kernels.chips import chip_for as chip_for
from pallas_kernels.chips import current_chip as current_chip
from pallas_kernels.configs import FewRowsConfig as FewRowsConfig
from pallas_kernels.configs import MosaicConfig as MosaicConfig
from pallas_kernels.configs import TritonConfig as TritonConfig
from pallas_kernels.configs import check_config as check_config
from pallas_kernels.configs import default_configs as default_configs
from pallas_kernels.few_rows import FEW_ROWS as FEW_ROWS
from pallas_kernels.few_rows import Planes as Planes
from pallas_kernels.few_rows import int8_matmul_few_rows as int8_matmul_few_rows
from pallas_kernels.few_rows import quantize_few_rows as quantize_few_rows
from pallas_kernels.matmul import int8_matmul_mixed as int8_matmul_mixed
from pallas_kernels.matmul import llm_int8_matmul as llm_int8_matmul
from pallas_kernels.matmul import pick_config as pick_config
from pallas_kernels.outliers import Outliers as Outliers
from pallas_kernels.outliers import compact as compact
from pallas_kernels.outliers import find_outliers as find_outliers
from pallas_kernels.quantize_rows import QuantizedRows as QuantizedRows
from pallas_kernels.quantize_rows import gather_columns as gather_columns
from pallas_kernels.quantize_rows import quantize_rows as quantize_rows
