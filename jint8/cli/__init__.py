"""The command line: `jint8 demo`, `generate`, `quantize` and `eval`."""

from jint8.cli._main import main as main
