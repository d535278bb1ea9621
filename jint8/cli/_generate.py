"""Continue a text, or answer in a chat.

The answer goes to standard output as it comes; several prompts run as one batch, or as several of --batch-size, whose
answers are printed when all of the batch are complete. --chat without a prompt is a conversation: each line of standard
input is a turn, until it ends (Ctrl-D). Ctrl-C ends an answer, and between answers the conversation.

JSON: text (a list for several prompts), prompt_tokens, new_tokens (with the end token), tokens_per_s (of decoding,
without the first token; from the second block of tokens on, as the first one waits for compilation, where there are
more; null where there was only one token), first_token_s (with compilation; of the first batch), weight_bytes {int8,
float}: of all parameters as they are, and all in floating point.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jint8.cli import _common

if TYPE_CHECKING:
    import numpy as np

    from jint8 import LanguageModel
    from jint8._inference.request import Choice
    from jint8.checkpoints import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SRC", help=_common.SOURCE)
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="what to continue; may be repeated")
    parser.add_argument("--prompt-file", action="append", metavar="FILE", help="a file with a prompt; may be repeated")
    _common.add_batch_argument(parser, "prompts at once", default=None)
    parser.add_argument("--chat", action="store_true", help="prompts are messages for the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message, with which each chat begins")
    parser.add_argument("--warm", action="store_true", help="compile before the first turn of a conversation")
    add_sampling_arguments(parser)
    add_kv_cache_argument(parser)
    _common.add_model_arguments(parser)
    _common.add_adapter_argument(parser)
    _common.add_verify_argument(parser)
    _common.add_cache_argument(parser)
    _common.add_output_arguments(parser)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How the answer is chosen, and where it ends."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=128, metavar="N", help="at most so many new tokens (128)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest; 0 means all (0)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among those that hold P (1)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="draw among those P times as likely (0)")
    group.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="divides logits of tokens there were (1)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw (0)")
    group.add_argument("--stop", action="append", default=[], metavar="S", help="end before this text; may be repeated")


def add_kv_cache_argument(parser: argparse._ActionsContainer, more: str = "") -> None:
    """`--cache`; `more` is said behind its help."""
    text = f"of keys and values: int8, a quarter of float32's memory; default: the activations' dtype{more}"
    parser.add_argument("--cache", metavar="KIND", choices=["int8"], help=text)


def check_sampling(args: argparse.Namespace) -> None:
    """Raises ValueError for an option of `add_sampling_arguments` that is out of its range."""
    from jint8._inference.sampling import Sampling
    from jint8._inference.text import stop_texts

    _common.check_least(args, max_tokens=1)
    Sampling.of(**choice(args))
    for text in stop_texts(args.stop):
        _common.check_text(text, "--stop")


def choice(args: argparse.Namespace) -> Choice:
    """How the next token is chosen, as `LanguageModel.generate` takes it."""
    return {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
    }


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    prompts = [*(args.prompt or []), *map(_common.read_text, args.prompt_file or [])]
    if not prompts and (args.json or not args.chat):
        raise ValueError("Expected a --prompt or a --prompt-file (or --chat, without --json), got none")
    if args.system is not None and not args.chat:
        raise ValueError("Expected --system with --chat, got it without")
    if args.batch_size is not None and not prompts:
        raise ValueError("Expected --batch-size with a --prompt, got it with a conversation")
    if args.warm and (prompts or not args.chat):
        raise ValueError("Expected --warm with a conversation (--chat without a prompt), got it without")
    for text, name in [*((prompt, "--prompt") for prompt in prompts), (args.system or "", "--system")]:
        _common.check_text(text, name)
    _common.check_least(args, batch_size=1)
    check_sampling(args)
    config = _common.quant_config(args)
    _common.use_compile_cache(args)
    model = _common.load(args, _common.find_source(args, args.source), config=config)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    if not prompts:
        if args.warm:
            model.warm(max_tokens=args.max_tokens, cache=args.cache)
        converse(args, model, system)
        return
    tokenizer = model.require_tokenizer()
    if args.chat:
        ids = [chat_ids(tokenizer, [*system, {"role": "user", "content": prompt}]) for prompt in prompts]
    else:
        ids = [tokenizer.encode(prompt) for prompt in prompts]
    _common.report(args, answer_in_batches(args, model, ids))


def answer_in_batches(args: argparse.Namespace, model: LanguageModel, prompts: list[list[int]]) -> dict[str, Any]:
    """`answer`, of `--batch-size` prompts at a time. Speed is that of all tokens, each at the speed of its batch."""
    import numpy as np

    size = args.batch_size or len(prompts)
    if size >= len(prompts):
        return answer(args, model, prompts)
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    for begin in range(0, len(prompts), size):
        batch = prompts[begin : begin + size]
        if begin and not args.json:
            print()  # between answers, as there is within a batch
        is_last = begin + size >= len(prompts)
        # Each batch draws numbers of its own: the same prompt twice may have two answers.
        seed = args.seed if not begin else int(np.random.SeedSequence([args.seed % 2**64, begin]).generate_state(1)[0])
        result = answer(args, model, batch, None if is_last else [""] * len(batch), seed=seed)
        texts += [result["text"]] if len(batch) == 1 else result["text"]
        results.append(result)
    timed = [result for result in results if result["tokens_per_s"]]
    seconds = sum(result["new_tokens"] / result["tokens_per_s"] for result in timed)
    tokens = sum(result["new_tokens"] for result in timed)
    return results[0] | {
        "text": texts,
        "prompt_tokens": sum(result["prompt_tokens"] for result in results),
        "new_tokens": sum(result["new_tokens"] for result in results),
        "tokens_per_s": tokens / seconds if timed else None,
    }


def chat_ids(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """A conversation as the tokens that the assistant's answer follows."""
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)


def converse(args: argparse.Namespace, model: LanguageModel, messages: list[dict[str, str]]) -> None:
    """Answers each line of standard input, knowing the lines and answers before it.

    Ctrl-C in an answer ends that answer; what there is of it counts as the answer. Elsewhere it is not caught.
    """
    while (turn := _turn()) is not None:
        if turn.strip():
            asked = [*messages, {"role": "user", "content": turn}]
            texts = [""]
            try:
                answer(args, model, [chat_ids(model.require_tokenizer(), asked)], texts)
            except KeyboardInterrupt:
                print(flush=True)  # ends the line of the answer
                if not texts[0]:  # it's as if nothing was asked: models know no message without an answer
                    continue
            messages = [*asked, {"role": "assistant", "content": texts[0]}]


def _turn() -> str | None:
    """The next line of standard input, without its end; None after the last."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (where Python has it, `input` then lets lines be edited)
    try:
        return _common.check_text(input("> " if sys.stdin.isatty() else ""), "standard input")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected text in UTF-8 on standard input, got: {error}") from None
    except EOFError:
        return None


def answer(
    args: argparse.Namespace,
    model: LanguageModel,
    prompts: list[list[int]],
    texts: list[str] | None = None,
    *,
    seed: int | None = None,
) -> dict[str, Any]:
    """Continues tokens; the text is printed as it comes unless `--json` was given. Returns it, and what it took.

    `texts` is given where more answers follow; it receives what there is of each text, for whoever interrupts it.
    `seed` takes the place of `--seed`.
    """
    from jint8 import memory_report
    from jint8._inference.language_model import STOP_TOKENS, STREAM_TOKENS
    from jint8._inference.text import stop_texts, text_pieces

    tokenizer, stop = model.require_tokenizer(), stop_texts(args.stop)
    stream = len(prompts) == 1 and not args.json
    chunks = model.generate_tokens(
        prompts,
        max_tokens=args.max_tokens,
        seed=args.seed if seed is None else seed,
        cache=args.cache,
        every=STREAM_TOKENS if stream else STOP_TOKENS,
        **choice(args),
    )
    meter = Meter(chunks, len(prompts), tokenizer.eos_ids)
    last = texts is None
    texts = [""] * len(prompts) if texts is None else texts
    for pieces in text_pieces(meter, tokenizer, len(prompts), stop):
        texts[:] = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        if stream:
            print(pieces[0], end="", flush=True)
    if stream:
        print()
    elif not args.json:
        print("\n\n".join(texts))
    if last and not args.json:
        _common.complete(args)
    report = memory_report(model.params)
    speed = f"{meter.tokens_per_s:.1f} tokens/s" if meter.tokens_per_s else "one token"
    _common.say(args, f"{meter.new_tokens} new tokens, {speed}, the first after {meter.first_token_s:.2f} s")
    return {
        "text": texts[0] if len(texts) == 1 else texts,
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": meter.new_tokens,
        "tokens_per_s": meter.tokens_per_s,
        "first_token_s": meter.first_token_s,
        "weight_bytes": {"int8": report.bytes, "float": report.float_bytes},
    }


class Meter:
    """Counts the tokens that come by and takes the time. Iterates over the chunks it is given, without a change.

    Attributes:
      new_tokens: of all rows, up to and with their end tokens.
      first_token_s: seconds until the first token of each row.

    The second chunk waits for decoding to be compiled, so speed counts from there, where there are more.
    """

    def __init__(self, chunks: Iterator[np.ndarray], rows: int, end_tokens: tuple[int, ...]):
        self._chunks = chunks
        self._running = [True] * rows
        self._end_tokens = end_tokens
        self._begin = time.perf_counter()
        self._last_s = 0.0
        self._counted: list[tuple[int, float]] = []  # tokens and seconds after each of the first two chunks
        self.new_tokens = 0
        self.first_token_s = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        for chunk in self._chunks:
            self._last_s = time.perf_counter() - self._begin
            for row, tokens in enumerate(chunk.tolist()):
                for token in tokens:
                    self.new_tokens += self._running[row]
                    self._running[row] &= token not in self._end_tokens
            if not self._counted:
                self.first_token_s = self._last_s
            if len(self._counted) < 2:
                self._counted.append((self.new_tokens, self._last_s))
            yield chunk

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of those after the second chunk, or where it is the last, the first; None without any."""
        for tokens, seconds in reversed(self._counted):
            if self.new_tokens > tokens:
                return (self.new_tokens - tokens) / (self._last_s - seconds)
        return None
