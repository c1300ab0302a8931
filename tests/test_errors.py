"""What a program ends with: one line, the right code, and a traceback only when asked for."""

import errno

import pytest

from sega_dist.errors import BAD_DATA, DISK, INTERNAL, USAGE, UserError, run


def raising(error: BaseException):
    def main(argv: list[str] | None) -> None:
        assert "--debug" not in (argv or [])
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no such\n  thing"), USAGE, "error: no such thing\n"),
        (UserError("bad", BAD_DATA), BAD_DATA, "error: bad\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), DISK, "error: No space left on device: /x\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), USAGE, "error: Permission denied: /x\n"),
        (
            ZeroDivisionError("oops"),
            INTERNAL,
            "internal error: ZeroDivisionError: oops (--debug shows the traceback)\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_end_is_one_line_and_a_code(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        run(raising(error), [])
    assert ended.value.code == code
    assert capsys.readouterr() == ("", said)


def test_debug_shows_the_error_itself():
    for error in (UserError("bad"), ZeroDivisionError("oops")):
        with pytest.raises(type(error)):
            run(raising(error), ["--debug"])


def test_other_ranks_say_who_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        run(raising(UserError("bad")), [])
    assert capsys.readouterr().err == "error (rank 3): bad\n"
