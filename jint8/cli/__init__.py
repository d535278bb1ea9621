"""The command line: `jint8 demo`, `generate`, `quantize`, `eval`, `outliers`, `bench` and `fit`.

May import everything, and nothing imports it. Start with `_main.py`: it has the table of commands, and turns errors
into one line and an exit status. A command is one file, with its help as docstring and two functions, `add_arguments`
and `run`; `_common.py` has what they share.

Files import JAX and the rest of jint8 inside of functions: `jint8 --help` and bad arguments needn't wait for it, and
`fit` sets up JAX's devices before it starts.
"""

from jint8.cli._main import main as main
