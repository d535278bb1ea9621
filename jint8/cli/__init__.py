"""The command line: `jint8 demo`, `generate`, `quantize`, `eval`, `outliers`, `bench` and `fit`."""

from jint8.cli._main import main as main
