"""What mkdocs calls to build the site: pages from docstrings and from commands' help, and files that pages link."""

import argparse
import importlib
import inspect
import os
import re
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
MODULES = ("jint8", "jint8.linen", "jint8.nnx", "jint8.analysis", "jint8.checkpoints", "jint8.models", "jint8.cli")
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")


def public_names(module) -> list[str]:
    """The names that a module offers: those of `__all__` or `dir`, without modules and what others define."""
    names = getattr(module, "__all__", None) or dir(module)
    return [name for name in names if not name.startswith("_") and _ours(getattr(module, name))]


def _ours(value) -> bool:
    if inspect.ismodule(value):
        return False
    return getattr(value, "__module__", "jint8").split(".")[0] == "jint8"


def reference() -> str:
    """The page, in Markdown: each module's public names with signature and docstring, as written."""
    parts = ["# API reference\n"]
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        parts.append(f"## {module_name}\n")
        for name in public_names(module):
            value = getattr(module, name)
            parts.append(f"### {module_name}.{name}\n")
            if inspect.isclass(value) or inspect.isroutine(value):
                parts.append(_fenced(f"{name}{_signature(value)}\n\n{inspect.getdoc(value) or ''}".rstrip()))
            else:
                parts.append(_fenced(f"{name} = {value!r}"))
    return "\n".join(parts)


def _signature(value) -> str:
    try:
        # An address in the text of a default value would differ from build to build.
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(value)))
    except (TypeError, ValueError):
        return ""


def _fenced(text: str) -> str:
    return f"````text\n{text}\n````\n"


def command_line() -> str:
    """What cli.md has below its own text, in Markdown: the help of each command."""
    from jint8.cli._main import COMMANDS, build_parser

    subparsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = [""]
    with mock.patch.dict(os.environ, COLUMNS="110"):  # argparse's width, else that of the terminal
        for name in COMMANDS:
            parts.append(f"## jint8 {name}\n\n{_fenced(subparsers.choices[name].format_help().rstrip())}")
    return "\n".join(parts)


def _published(path: str) -> str:
    # mkdocs would render a Markdown file as a page, whose links lead to files that aren't on the site.
    return f"repository/{path}.txt" if path.endswith(".md") else f"repository/{path}"


def on_files(files, config):
    """Adds the API reference, and a copy of each file outside docs/ that a page links."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "api.md", content=reference()))
    texts = [path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))]
    for path in sorted({path for text in texts for path in _OUTSIDE.findall(text)}):
        files.append(File.generated(config, _published(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links those copies, and adds the commands' help to their page."""
    if page.file.src_uri == "cli.md":
        markdown += command_line()
    return _OUTSIDE.sub(lambda match: f"]({_published(match[1])}", markdown)
