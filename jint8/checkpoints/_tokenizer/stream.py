"""Text from tokens as they come."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes. After this many tokens without a whole character they aren't text; send them out.
MAX_PENDING = 32


class TextStream:
    """Turns a sequence of tokens into pieces of text that add up to the text of the whole sequence.

    A piece ends where a character ends: bytes of a character whose other bytes are in the next token wait for it.
    Each token costs the decoding of the few tokens since the last complete piece, however long the text is.

    Examples:
      >>> from jint8.checkpoints import TextStream
      >>> tokens = ["Gr".encode(), "ü".encode()[:1], "ü".encode()[1:] + b"n"]
      >>> stream = TextStream(lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"))
      >>> [stream.push(i) for i in range(3)], stream.flush()
      (['Gr', '', 'ün'], '')
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], *, skip: frozenset[int] = frozenset()):
        """Start an empty stream.

        Args:
          decode: from tokens to text; incomplete characters as U+FFFD.
          skip: tokens that have no text.
        """
        self._decode = decode
        self._skip = skip
        # The window: the tokens of the last complete piece, then those since. The last piece stays in because a decoder
        # may treat the first token of a text differently (SentencePiece's strips a space), and new ones aren't first.
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that `push` has returned
        self._pending = 0  # tokens of the window since the last complete piece

    def push(self, token: int) -> str:
        """Take one token.

        Args:
          token: its id.

        Returns:
          The text that is complete with it; often a word, sometimes "".
        """
        if token in self._skip:
            return ""
        self._window.append(token)
        self._pending += 1
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and self._pending < MAX_PENDING:
            complete = text.rstrip(REPLACEMENT)
            piece = complete[self._sent :]
            self._sent = max(self._sent, len(complete))
            return piece
        piece = text[self._sent :]
        self._window = self._window[-self._pending :]
        self._sent = len(self._decode(self._window))
        self._pending = 0
        return piece

    def flush(self) -> str:
        """End the text.

        Returns:
          What was held back: U+FFFD for a character that never was completed, usually "".
        """
        piece = self._decode(self._window)[self._sent :]
        self._window, self._sent, self._pending = [], 0, 0
        return piece
