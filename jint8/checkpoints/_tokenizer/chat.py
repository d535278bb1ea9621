"""Chat templates: Jinja as Hugging Face's tokenizers use it, in a sandbox."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jint8.checkpoints._optional import require


def render_chat(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Render a chat template.

    Args:
      template: the Jinja source.
      messages: the conversation.
      **variables: what else the template may use (`add_generation_prompt`, `bos_token`, ...).

    Returns:
      The prompt.

    Raises:
      ValueError: the template can't be rendered, or refuses these messages.
    """
    require("jinja2")
    try:
        return _environment().from_string(template).render(messages=list(messages), **variables)
    except Exception as e:  # a template is a program, and raises what it likes
        raise ValueError(f"Expected a chat that the tokenizer's template accepts, got: {e}") from e


def _environment() -> Any:
    jinja2, sandbox, ext = require("jinja2"), require("jinja2.sandbox"), require("jinja2.ext")

    class Generation(ext.Extension):  # type: ignore[name-defined]
        """`{% generation %}` marks the assistant's text for training; when rendering it is plain text."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    # transformers has these settings, and templates rely on them: without trim_blocks and lstrip_blocks the line breaks
    # around {% ... %} would be part of the prompt.
    env = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, Generation]
    )
    # Jinja's own tojson escapes <, > and & for HTML, which models weren't trained on.
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env
