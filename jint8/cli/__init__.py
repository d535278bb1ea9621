"""The command line: `jint8 demo`, `generate`, `quantize`, `eval` and `bench`."""

from jint8.cli._main import main as main
