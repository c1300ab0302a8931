"""One line and one exit code for every error a user can cause."""

import contextlib
import difflib
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

USAGE = 2  # a wrong option, or bad input found before work starts
BAD_DATA = 65  # data that turn bad during a run
INTERNAL = 70  # a mistake of ours
NON_FINITE = 71  # a loss or a weight that is not a finite number
TAKEN_OVER = 73  # another process writes into this run's folder now
DISK = 74  # no space left, or a file system that cannot be written
LOST_RANK = 75  # another process died or cannot be reached: try again
PREEMPTED = 85  # asked to stop; a checkpoint was saved
HANG = 86  # no progress within the bound; the stacks were written down

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


class UserError(Exception):
    """What was wrong, where, and what to do, in one line; `code` becomes the exit status."""

    def __init__(self, message: str, code: int = USAGE):
        super().__init__(message)
        self.code = code


class NonFinite(UserError):
    """A loss or a weight that is not a finite number."""

    def __init__(self, message: str):
        super().__init__(message, NON_FINITE)


def exit_code(error: BaseException) -> int:
    """What a program that ends by `error` exits with."""
    if isinstance(error, UserError):
        return error.code
    if isinstance(error, OSError):
        return DISK if error.errno in NO_ROOM else USAGE
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else INTERNAL


def note(file: Path, error: BaseException, where: str) -> None:
    """Append `error` with its traceback to `file`; where that cannot be, the one line on stderr must do."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        with file.open("a") as stream:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), where, file=stream)
            traceback.print_exception(error, file=stream)


def in_words(error: BaseException) -> str:
    """One line for `error`; a file's name where it is about one."""
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or ''}"
    return f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def closest(name: str, names: list[str]) -> str:
    """A hint naming the nearest of `names`, or nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Call `main` as a program: errors in one line, tracebacks only with `--debug`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in argv
    signal.signal(signal.SIGTERM, _interrupt)  # so that what is half-written is cleaned up
    try:
        main([word for word in argv if word != "--debug"])
    except BrokenPipeError:  # `| head` closed the pipe: nobody is left to read, and no error to report
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        sys.exit(exit_code(KeyboardInterrupt()))
    except (UserError, OSError) as error:
        if is_debug:
            raise
        say("error", in_words(error))
        sys.exit(exit_code(error))
    except Exception as error:  # a mistake of ours: still one line, and the way to see the rest
        if is_debug:
            raise
        say("internal error", f"{in_words(error)} (--debug shows the traceback)")
        sys.exit(INTERNAL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def say(kind: str, message: object) -> None:
    """One line; processes other than the first say which they are."""
    rank = os.environ.get("RANK", "0")
    print(f"{kind}{'' if rank == '0' else f' (rank {rank})'}: {' '.join(str(message).split())}", file=sys.stderr)
