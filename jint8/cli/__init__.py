"""The command line: `jint8 demo`, `generate`, `quantize`, `eval`, `outliers`, `bench` and `fit`.

May import everything, and nothing imports it. Start with `_main.py`: it has the table of commands, and turns errors
into one line and an exit status. A command is one file, with its help as docstring and two functions, `add_arguments`
and `run`; `_common.py` has what they share, `_waiting.py` what is said to somebody who waits, `_compile_cache.py` the
programs that are kept for the next run. `jint8_main.py`, outside of the package, is the process around it all.

Arguments are checked before anything is loaded. Files import the rest of jint8 inside of functions: `jint8 --help` and
bad arguments needn't wait for Flax, and `fit` sets up JAX's devices before it starts.
"""

from jint8.cli._main import main as main
