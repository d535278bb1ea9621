"""From arguments to a command, and from errors to one line and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from jint8.cli import _bench, _common, _demo, _eval, _fit, _generate, _outliers, _quantize

COMMANDS = {
    "demo": _demo,
    "generate": _generate,
    "quantize": _quantize,
    "eval": _eval,
    "outliers": _outliers,
    "bench": _bench,
    "fit": _fit,
}
OLD_NAMES = {"plan": "fit"}  # of commands; they still work
BAD_INPUT, INTERRUPTED = 2, 130
ERRORS = (ValueError, TypeError, OSError, ImportError, KeyError, NotImplementedError)


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with a message, without the usage."""
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the arguments; None means the process's.

    Returns:
      The exit status: 0, 2 for bad input (with one line on standard error), 130 when interrupted.

    Examples:
      >>> import contextlib, io
      >>> from jint8.cli import main
      >>> with contextlib.redirect_stdout(io.StringIO()) as out:
      ...     status = main(["--version"])
      >>> status, out.getvalue().split()[0]
      (0, 'jint8')
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as exit:  # argparse, after --help or an error
        return int(exit.code or 0)
    try:
        args.run(args)
        sys.stdout.flush()
        if new := OLD_NAMES.get(args.command):
            _common.say(args, f"jint8: the command {args.command} is called {new} now")
    except KeyboardInterrupt:
        print("jint8: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ERRORS as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"jint8: {' '.join(str(message).split())}", file=sys.stderr)
        return BAD_INPUT
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from jint8 import __version__

    parser = Parser(prog="jint8", description="LLM.int8() for JAX: language models with int8 weights.")
    parser.add_argument("--version", action="version", version=f"jint8 {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, module in COMMANDS.items():
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            aliases=[old for old, new in OLD_NAMES.items() if new == name],
            help=text.partition("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
