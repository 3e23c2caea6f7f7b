"""Runs a command so that it ends in one line and an exit status, never in a traceback.

A user may press Ctrl-C at any moment, the reader of a pipe may leave, and the disk behind a redirected output may be
full. Each of these has an exit status: 130 for an interruption and 141 for a closed pipe, as shells report the two
signals, and 1 for everything that the user can put right.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

TRACEBACK_VARIABLE = "HAWK_KERNELS_TRACEBACK"
"""Set to anything, lets an error through with its traceback."""

INTERRUPTED, CLOSED_PIPE = 130, 141


class CommandError(Exception):
    """Something that the user can put right; the message says what happened and what to do."""


def run_guarded(command: Callable[[], int], *, is_process: bool = False, show_traceback: bool = False) -> int:
    """Run a command and return its exit status; say in one line on stderr what went wrong.

    Args:
        command: returns the exit status.
        is_process: whether the process ends when this returns, so that a later Ctrl-C can be ignored.
        show_traceback: whether an error is let through, as the variable HAWK_KERNELS_TRACEBACK also asks.

    Raises:
        SystemExit: from argparse, which has printed its message.
    """
    with _interruptions() as interruption:
        try:
            status = command()
            _flush_stdout()
        except SystemExit:
            _flush_or_discard_stdout()
            raise
        except BrokenPipeError:
            _discard_stdout()
            status = CLOSED_PIPE
        except BaseException as error:
            # whoever catches KeyboardInterrupt and raises something else was interrupted all the same
            if interruption.happened or isinstance(error, KeyboardInterrupt):
                status = interruption.report(error)
            elif not isinstance(error, Exception) or show_traceback or os.environ.get(TRACEBACK_VARIABLE):
                raise
            else:
                _flush_or_discard_stdout()
                say_error(one_line(error))
                status = 1
    if is_process and threading.current_thread() is threading.main_thread():
        # the work is done, and unloading torch takes long enough for another Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


def one_line(error: BaseException) -> str:
    """An error as one line for a person: its message, with the kind of error where the message alone says little."""
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, (CommandError, ValueError, TypeError, ImportError, OSError)) and text:
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


class _Interruption:
    """Whether Ctrl-C was pressed, and what is said about it."""

    def __init__(self) -> None:
        self.happened = False
        self._is_reported = False

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.happened:
            # asked twice: whatever holds the first interruption up is not waited for
            self.report(None)
            os._exit(INTERRUPTED)
        self.happened = True
        raise KeyboardInterrupt

    def on_unraisable(self, unraisable: Any) -> None:
        """End the process where the interruption fell into a finaliser, from which no exception gets out."""
        if self.happened and issubclass(unraisable.exc_type, KeyboardInterrupt):
            self.report(None)
            os._exit(INTERRUPTED)
        sys.__unraisablehook__(unraisable)

    def report(self, error: BaseException | None) -> int:
        self.happened = True
        if not self._is_reported:
            self._is_reported = True
            note = str(error) if isinstance(error, KeyboardInterrupt) else ""
            with suppress(OSError, ValueError, AttributeError):
                print(f"stopped{f'; {note}' if note else ''}", file=sys.stderr, flush=True)
            _flush_or_discard_stdout()
        return INTERRUPTED


@contextmanager
def _interruptions() -> Iterator[_Interruption]:
    interruption = _Interruption()
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not default or threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, interruption.on_signal)
    sys.unraisablehook = interruption.on_unraisable
    try:
        yield interruption
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _flush_stdout() -> None:
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        raise CommandError(f"cannot write the output: {error.strerror}") from error


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
