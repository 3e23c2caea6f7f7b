"""Run a command so that it ends in one line and an exit status, never in a traceback.

A user may press Ctrl-C at any moment, the reader of a pipe may leave, and the disk of a redirected output may be
full. Each of these has an exit status: 130 for an interruption and 141 for a closed pipe, as shells report the two
signals, and 1 for everything that the user can put right.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from hawk_kernels.output_files import remove_partial_files

TRACEBACK_VARIABLE = "HAWK_KERNELS_TRACEBACK"
"""Set to anything, lets an error through with its traceback."""

INTERRUPTED, CLOSED_PIPE = 130, 141

PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""What pip calls the modules whose package has another name."""


def need_packages(purpose: str, *modules: str) -> None:
    """Raise `CommandError` with the pip command where a module that a command needs is not installed.

    Args:
        purpose: what needs them, as the message begins.
        modules: by the names under which they are imported.
    """
    missing = []
    for module in modules:
        try:
            __import__(module)
        except ImportError as error:
            if f"No module named {module!r}" not in str(error):
                raise CommandError(f"{purpose} cannot import {module}: {' '.join(str(error).split())}") from error
            missing.append(PACKAGES.get(module, module))
    if missing:
        raise CommandError(
            f"{purpose} needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}"
        )


class CommandError(Exception):
    """Something that the user can put right; the message says what happened and what to do."""


def run_guarded(command: Callable[[], int], *, is_process: bool = False, show_traceback: bool = False) -> int:
    """Run a command and return its exit status; say in one line on stderr what went wrong.

    Args:
        command: returns the exit status.
        is_process: whether the process ends with the command. Ctrl-C then ends it at once, since libraries catch a
            KeyboardInterrupt and raise something else, or lose it in a finaliser.
        show_traceback: whether an error is let through, as the variable HAWK_KERNELS_TRACEBACK also asks.

    Raises:
        SystemExit: from argparse, which has printed its message.
    """
    if is_process and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    try:
        status = command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit:
        _flush_or_discard_stdout()
        raise
    except KeyboardInterrupt:
        _say_stopped()
        status = INTERRUPTED
    except BrokenPipeError:
        _discard_stdout()
        status = CLOSED_PIPE
    # whatever went wrong is said in one line
    except Exception as error:
        if show_traceback or os.environ.get(TRACEBACK_VARIABLE):
            raise
        _flush_or_discard_stdout()
        say_error(one_line(error))
        status = 1
    if is_process:
        # the work is done, and unloading torch takes long enough for another Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


@contextmanager
def stopping_note(note: Callable[[], str]) -> Iterator[None]:
    """Say what `note` returns, if anything, when Ctrl-C ends the process inside the block."""
    _notes.append(note)
    try:
        yield
    finally:
        _notes.remove(note)


def one_line(error: BaseException) -> str:
    """Write an error as one line: its message, with the kind of error where the message alone says little."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        # an error without a file comes from a stream
        return f"{error.filename or 'cannot write the output'}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and error.name and "pip install" not in text:
        top = error.name.partition(".")[0]
        return f"{text}: pip install {PACKAGES.get(top, top)}"
    is_ours = type(error).__module__.startswith("hawk_kernels")
    if text and (is_ours or isinstance(error, (ValueError, TypeError, ImportError, OSError))):
        return text
    told = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{told} (unexpected; {TRACEBACK_VARIABLE}=1 shows where it happens)"


def say_error(message: str) -> None:
    """Print `error: message` on stderr, which may be closed."""
    with suppress(OSError, ValueError, AttributeError):
        print(f"error: {message}", file=sys.stderr, flush=True)


def say_warning(message: str) -> None:
    """Print `warning: message` on stderr, which may be closed."""
    with suppress(OSError, ValueError, AttributeError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


_notes: list[Callable[[], str]] = []


def _stop(signum: int, frame: FrameType | None) -> None:
    """End the process on Ctrl-C; files are whole, since they are renamed into place, and journals are kept by line."""
    _say_stopped()
    remove_partial_files()
    os._exit(INTERRUPTED)


def _say_stopped() -> None:
    notes = [text for text in (note() for note in _notes) if text]
    # a progress bar stands on the line
    bars = getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())
    text = ("\n" if len(bars) else "") + "; ".join(["stopped", *notes]) + "\n"
    with suppress(OSError):
        # print is not safe in a signal handler that interrupts another print
        os.write(2, text.encode())


def _flush_or_discard_stdout() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        _discard_stdout()


def _discard_stdout() -> None:
    """Point stdout at the null device: Python flushes it again at exit, and would complain."""
    with suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
