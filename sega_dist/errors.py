"""One line and one exit code for every error a user can cause."""

import difflib
import errno
import os
import signal
import sys
from collections.abc import Callable

USAGE = 2  # a wrong option, or bad input found before work starts
BAD_DATA = 65  # data that turn bad during a run
INTERNAL = 70  # a mistake of ours
NON_FINITE = 71  # a loss or a weight that is not a finite number
DISK = 74  # no space left, or a file system that cannot be written
LOST_RANK = 75  # another process died or cannot be reached: try again
PREEMPTED = 85  # asked to stop; a checkpoint was saved

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class UserError(Exception):
    """What was wrong, where, and what to do, in one line; `code` becomes the exit status."""

    def __init__(self, message: str, code: int = USAGE):
        super().__init__(message)
        self.code = code


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
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError) as error:
        if is_debug:
            raise
        say("error", error if isinstance(error, UserError) else f"{error.strerror or error}: {error.filename or ''}")
        sys.exit(error.code if isinstance(error, UserError) else DISK if error.errno in NO_ROOM else USAGE)
    except Exception as error:  # a mistake of ours: still one line, and the way to see the rest
        if is_debug:
            raise
        say("internal error", f"{type(error).__name__}: {error} (--debug shows the traceback)")
        sys.exit(INTERNAL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def say(kind: str, message: object) -> None:
    """One line; processes other than the first say which they are."""
    rank = os.environ.get("RANK", "0")
    print(f"{kind}{'' if rank == '0' else f' (rank {rank})'}: {' '.join(str(message).split())}", file=sys.stderr)
