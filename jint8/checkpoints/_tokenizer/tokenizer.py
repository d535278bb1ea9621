"""Text to tokens and back."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from jint8.checkpoints._tokenizer.chat import render_chat
from jint8.checkpoints._tokenizer.stream import TextStream


class Tokenizer:
    """A tokenizer with its special tokens and chat template.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work.
      bos_id: token that begins a text, or None.
      eos_ids: tokens that end a generated text.
      pad_id: padding token, or None.
      chat_template: Jinja source, or None.
      tool_template: another one for conversations with tools, or None.
    """

    def __init__(
        self,
        backend: Any,
        *,
        bos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        pad_id: int | None = None,
        chat_template: str | None = None,
        tool_template: str | None = None,
        doubt: str | None = None,
    ):
        """`doubt` is a warning for the first text that is encoded.

        Raises TypeError for ids and templates of other types, as damaged files have them.
        """
        eos_ids = tuple(eos_ids)
        for i in (bos_id, *eos_ids, pad_id):
            if isinstance(i, bool) or not isinstance(i, Integral | None):
                raise TypeError(f"Expected ids of special tokens to be integers, got {i!r}")
        for template in (chat_template, tool_template):
            if not isinstance(template, str | None):
                raise TypeError(f"Expected a chat template to be a string, got {type(template).__name__}")
        # A tokenizer.json may have been saved with truncation and padding on, which would change a text's tokens.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.pad_id = pad_id
        self.chat_template = chat_template
        self.tool_template = tool_template
        self._doubt = doubt
        self._special = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, with the added ones."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turn text into tokens.

        Args:
          text: the text; special tokens written in it (`<|im_start|>`) become those tokens.
          add_special_tokens: whether to add what the tokenizer adds to a text, such as BOS. False for a rendered chat
            template, which has its own.

        Returns:
          The tokens' ids.
        """
        if self._doubt is not None:
            warnings.warn(self._doubt, stacklevel=2)
            self._doubt = None
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Turn tokens into text.

        Args:
          ids: the tokens' ids.
          skip_special_tokens: whether to leave out special tokens.

        Returns:
          The text.
        """
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """Start an incremental decoder.

        Args:
          skip_special_tokens: whether to leave out special tokens.

        Returns:
          A stream whose `push(token)` gives the text that is complete, and whose `flush()` the rest at the end.
        """

        def decode(ids: Sequence[int]) -> str:
            return self.decode(ids, skip_special_tokens=skip_special_tokens)

        return TextStream(decode, skip=self._special if skip_special_tokens else frozenset())

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Render a conversation as the prompt that the model was trained on.

        Args:
          messages: such as `[{"role": "user", "content": "Hi"}]`.
          add_generation_prompt: whether to end with the start of the assistant's answer.
          **variables: more variables for the template, such as `tools`, `documents` or `enable_thinking`. With `tools`,
            the template is the one for tools where there is one.

        Returns:
          The prompt; encode it with `add_special_tokens=False`.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        template = self.chat_template
        if variables.get("tools") is not None and self.tool_template is not None:
            template = self.tool_template
        if template is None:
            raise ValueError("Expected a tokenizer with a chat template, got one without")
        # Templates ask whether they are None, which in Jinja a variable that isn't there isn't.
        absent = {"tools": None, "documents": None}
        tokens = {
            "bos_token": self._token(self.bos_id),
            "eos_token": self._token(next(iter(self.eos_ids), None)),
            "pad_token": self._token(self.pad_id),
        }
        given = {"add_generation_prompt": add_generation_prompt, **absent, **tokens, **variables}
        return render_chat(template, messages, **given)

    def _token(self, i: int | None) -> str:
        # Files have -1 for a token that there isn't.
        return "" if i is None or not 0 <= i < 2**32 else self.backend.id_to_token(i) or ""

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, bos_id={self.bos_id}, eos_ids={self.eos_ids})"
