"""From arguments to a command, and from errors to one line and an exit status.

The library says of bad input what it expected: "Expected ..., got ...". With the errors of files and missing packages,
these are the user's, and their message is all that is printed. Every other error is a bug of jint8's, and is called so.
The environment variable JINT8_DEBUG=1 lets both through as they are, with their traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from jint8.cli import _bench, _check, _common, _demo, _eval, _fit, _generate, _merge, _outliers, _quantize, _waiting

COMMANDS = {
    "demo": _demo,
    "generate": _generate,
    "quantize": _quantize,
    "merge": _merge,
    "eval": _eval,
    "check": _check,
    "outliers": _outliers,
    "bench": _bench,
    "fit": _fit,
}
OLD_NAMES = {"plan": "fit"}  # of commands; they still work
FAILED, INTERRUPTED = 2, 130
DEBUG = "JINT8_DEBUG=1 in the environment shows the traceback"


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with a message, without the usage."""
        self.exit(FAILED, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      argv: the arguments; None means the process's.

    Returns:
      The exit status: 0, 2 for bad input and other errors (with one line on standard error), 130 when interrupted.

    Raises:
      Exception: any error, with JINT8_DEBUG=1 in the environment.

    Examples:
      >>> import contextlib, io
      >>> from jint8.cli import main
      >>> with contextlib.redirect_stdout(io.StringIO()) as out:
      ...     status = main(["--version"])
      >>> status, out.getvalue().split()[0]
      (0, 'jint8')
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = build_parser()
        if not argv:
            parser.print_help()
            return 0
        args = parser.parse_args(one_pattern_each(argv), argparse.Namespace(complete=False))
    except SystemExit as exit:  # argparse raises it after --help and after an error
        return int(exit.code or 0)
    try:
        args.run(args)
        _common.complete(args)
        if new := OLD_NAMES.get(args.command):
            _common.say(args, f"jint8: the command {args.command} is called {new} now")
    except KeyboardInterrupt:
        if args.complete:
            return 0
        begin = "\n" if sys.stderr.isatty() else ""  # a terminal shows ^C, or there is a prompt
        print(f"{begin}jint8: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # Whoever read the output, such as `head`, has enough. Python's flush at exit mustn't fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if os.environ.get("JINT8_DEBUG", "0") not in ("", "0"):
            raise
        print(f"jint8: {' '.join(message(error).split())}", file=sys.stderr)
        return FAILED
    finally:
        _waiting.say_no_more()
    return 0


def one_pattern_each(argv: Sequence[str]) -> list[str]:
    """`quantize SRC DST --skip A B` as `--skip A --skip B`: an option of that command once took all that follows.

    Only where SRC and DST come first. Elsewhere nobody knows which of them follow.
    """
    if argv[0] != "quantize" or len(argv) < 3 or any(arg.startswith("-") for arg in argv[1:3]):
        return list(argv)
    found, option = list(argv[:3]), None
    for arg in argv[3:]:
        if arg.startswith("-"):
            option = arg if arg in ("--skip", "--include") else None
        elif option is not None and found[-1] != option:
            found.append(option)
        found.append(arg)
    return found


def message(error: Exception) -> str:
    """What to tell the user: what was wrong with the input, that memory is short, or that it is a bug."""
    if isinstance(error, (OSError, ImportError)) or "Expected " in str(error):
        return str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # the latter is XLA's
        return f"out of memory: {error}"
    return f"internal error: {type(error).__name__}: {error}; {DEBUG}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from jint8 import __version__

    parser = Parser(
        prog="jint8",
        description="LLM.int8() for JAX: language models with int8 weights.",
        epilog=f"An error is one line on standard error; {DEBUG}.",
    )
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
