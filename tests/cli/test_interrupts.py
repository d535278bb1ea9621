"""Ctrl-C: before the command line is there, in an answer, between answers, and when the result is out."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_model import make_llama_directory

import jint8
from jint8 import LanguageModel

UP = "import jint8_main; print('up', flush=True); jint8_main.run()"
# The command line as a function that says what is to be seen, in a process that needn't wait for JAX.
STUB = """
import signal, sys, types
import jint8_main
def main():
    {body}
for name in ("jint8", "jint8.cli"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["jint8.cli"].main = main
jint8_main.run()
"""


def process(code, *before):
    """In front, wherever the tests run: a shell has what it starts in the background ignore SIGINT."""
    in_front = "" if before else "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    argv = [*before, sys.executable, "-c", in_front + code, "--help"]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stub(body, *before):
    running = process(STUB.format(body=body), *before)
    return *running.communicate(), running.returncode


def test_during_import():
    running = process(UP)
    assert running.stdout.readline() == "up\n"
    time.sleep(0.1)  # the handler is there at once, and imports take longer
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert (out, err, running.returncode) == ("", "jint8: interrupted\n", 130)


ENDS = {
    "status": ("print('said'); return 2", ("said\n", "", 2)),
    "interrupt": ("print('said'); raise KeyboardInterrupt", ("said\n", "", 130)),
    "no_teardown": ("import atexit; atexit.register(print, 'teardown'); return 0", ("", "", 0)),
    "signal": ("print('said'); signal.raise_signal(signal.SIGINT)", ("said\n", "", 130)),
    "no_stdout": ("sys.stdout.close(); return 0", ("", "", 0)),
}


@pytest.mark.parametrize(("body", "expected"), ENDS.values(), ids=ENDS)
def test_end_of_the_process(body, expected):
    assert stub(body) == expected


def test_a_bug_keeps_its_traceback():
    out, err, status = stub("raise AssertionError('this')")
    assert (out, status) == ("", 1)
    assert err.endswith("AssertionError: this\n")


def test_in_the_background():
    """A shell has processes in the background ignore SIGINT, which is meant for the one in front."""
    body = "signal.raise_signal(signal.SIGINT); print('on'); return 0"
    assert stub(body, "sh", "-c", 'trap "" INT; exec "$0" "$@"') == ("on\n", "", 0)


@pytest.fixture
def chat(tmp_path, monkeypatch, run):
    """Runs a conversation -> status, output, errors; `interrupt` is after how many chunks Ctrl-C comes, by answer."""
    directory = make_llama_directory(tmp_path / "llama", seed=0)
    generate_tokens = LanguageModel.generate_tokens

    def chat(stdin, *interrupt):
        left = iter(interrupt)

        def interrupted(self, *args, **options):
            after = next(left, None)
            for number, chunk in enumerate(generate_tokens(self, *args, **options)):
                if number == after:
                    raise KeyboardInterrupt
                yield chunk

        monkeypatch.setattr(LanguageModel, "generate_tokens", interrupted)
        monkeypatch.setattr("sys.stdin", stdin)
        return run("generate", directory, "--chat", "--max-tokens", 9, "--dtype", "float32", "--quiet")

    chat.answer = lambda prompt, n: jint8.load(directory, dtype="float32").generate(prompt, max_tokens=n)
    return chat


@pytest.mark.slow
def test_in_an_answer(chat):
    """The answer ends, and what there is of it counts: one token, then four at a time."""
    first = chat.answer("[user]hi[assistant]", 5)
    second = chat.answer(f"[user]hi[assistant]{first}[user]you[assistant]", 9)
    assert chat(io.StringIO("hi\nyou\n"), 2) == (0, f"{first}\n{second}\n", "")


def test_before_the_answer(chat):
    """Nothing was answered, and so nothing was asked."""
    assert chat(io.StringIO("hi\nyou\n"), 0) == (0, f"\n{chat.answer('[user]you[assistant]', 9)}\n", "")


class Interrupted(io.StringIO):
    """Lines of standard input, and Ctrl-C where the next one is awaited."""

    def readline(self, *args):
        if line := super().readline(*args):
            return line
        raise KeyboardInterrupt


def test_at_the_prompt(chat):
    answer = chat.answer("[user]hi[assistant]", 9)
    assert chat(Interrupted("hi\n")) == (130, f"{answer}\n", "jint8: interrupted\n")


def test_after_the_result(llama, run, monkeypatch):
    """What comes behind it is not worth a word, nor another status."""
    argv = ("generate", llama, "--prompt", "hi", "--max-tokens", 3, "--dtype", "float32")
    _, expected, _ = run(*argv)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(jint8, "memory_report", interrupt)
    assert run(*argv) == (0, expected, "")
    assert run(*argv, "--json") == (130, "", "jint8: interrupted\n")  # which needs it


@pytest.mark.slow
def test_while_compiling(llama, tmp_path):
    """No crash at the end of the process, when XLA's threads are still at work."""
    argv = ["generate", llama, "--prompt", "hi", "--max-tokens", "40"]
    for seconds in (1.5, 2.0, 2.5, 3.0, 4.0):
        running = subprocess.Popen(
            # As the console script does; `python -m jint8` imports JAX before it.
            [sys.executable, "-c", "import jint8_main; jint8_main.run()", *map(str, argv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JINT8_CACHE": str(tmp_path / str(seconds))},
        )
        time.sleep(seconds)
        running.send_signal(signal.SIGINT)
        err = running.communicate()[1]
        assert (running.returncode, err.splitlines()[-1]) in ((130, "jint8: interrupted"), (0, err.splitlines()[-1]))
        assert "Traceback" not in err
