"""Outlier features, as in section 4 of the paper: statistics, plots, and planting them.

Start with `_calibrate` (`jint8.calibrate`), which runs a model on weights that watch their activations, and
`_criteria`, which judges what they saw. `_statistics`, `_plots` and `_report` show it; `_inject` plants outliers.

Imports `linen` (where a model runs, and then only), `_tracing`, `_trees`, `_ops` and `_core`.
"""

from jint8.analysis._checked import Check as Check
from jint8.analysis._checked import Checked as Checked
from jint8.analysis._inject import inject_outliers as inject_outliers
from jint8.analysis._plots import plot_features as plot_features
from jint8.analysis._plots import plot_magnitudes as plot_magnitudes
from jint8.analysis._plots import plot_models as plot_models
from jint8.analysis._report import html_report as html_report
from jint8.analysis._statistics import Feature as Feature
from jint8.analysis._statistics import Projection as Projection
from jint8.analysis._statistics import Statistics as Statistics
from jint8.analysis._statistics import outlier_statistics as outlier_statistics
