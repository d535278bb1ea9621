"""Text from tokens as they come."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so that more tokens than this in mid-character are no text any more.
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
            decode: From tokens to text; incomplete characters as U+FFFD.
            skip: Tokens that have no text.
        """
        self._decode = decode
        self._skip = skip
        # The tokens of the last complete piece (a decoder may treat the first token of a text specially, so that what
        # follows is decoded behind them), then those that are not complete yet; of their text, `_sent` is out.
        self._window: list[int] = []
        self._sent = 0
        self._pending = 0

    def push(self, token: int) -> str:
        """Take one token.

        Args:
            token: Its id.

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
