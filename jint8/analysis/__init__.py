"""Outlier features, as in section 4 of the paper: statistics, plots, and planting them."""

from jint8.analysis._inject import inject_outliers as inject_outliers
from jint8.analysis._plots import plot_features as plot_features
from jint8.analysis._plots import plot_magnitudes as plot_magnitudes
from jint8.analysis._plots import plot_models as plot_models
from jint8.analysis._report import html_report as html_report
from jint8.analysis._statistics import Feature as Feature
from jint8.analysis._statistics import Projection as Projection
from jint8.analysis._statistics import Statistics as Statistics
from jint8.analysis._statistics import outlier_statistics as outlier_statistics
