"""From the words a person typed to a dataclass; every complaint is one line."""

import contextlib
import dataclasses
import io
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from tyro.conf import Positional

from sega_dist.errors import UserError, closest

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda"]  # auto: the GPU where there is one

# Positional arguments by the names that usage lines show.
SourcePath = Annotated[Positional[Path], tyro.conf.arg(metavar="SOURCE")]
InPath = Annotated[Positional[Path], tyro.conf.arg(metavar="IN")]
OutPath = Annotated[Positional[Path], tyro.conf.arg(metavar="OUT")]
SnapshotPath = Annotated[Positional[Path], tyro.conf.arg(metavar="SNAPSHOT")]
RunPath = Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")]
RunPaths = Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
ShardsPath = Annotated[Positional[Path], tyro.conf.arg(metavar="SHARDS")]


def parse(command: type[T], argv: list[str], program: str, default: T | None = None) -> T:
    """Fill the dataclass `command` from `argv`; raises UserError for what cannot be understood."""
    complaint = io.StringIO()
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            value, unknown = tyro.cli(command, prog=program, args=argv, return_unknown_args=True, **defaults)
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise UserError(f"{_one_line(complaint.getvalue())} ({program} --help lists every option)") from None
    if unknown:
        raise UserError(_unknown(unknown[0], command, program))
    return value


def split(command: type, argv: list[str]) -> tuple[list[str], list[str]]:
    """The words for `command`, each option with its value, and those for another program."""
    ours, theirs, taking = list[str](), list[str](), 0
    options = {f"--{key.rpartition('.')[2].replace('_', '-')}" for key in keys(command)} | {"-h", "--help"}
    for word in argv:
        is_ours = word.partition("=")[0].replace("_", "-") in options
        taking = (1 if "=" in word else 2) if is_ours else taking - 1 if taking > 0 else 0
        (ours if taking else theirs).append(word)
    return ours, theirs


def keys(command: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a nested dataclass."""
    names = []
    for name, kind in typing.get_type_hints(command).items():
        names += keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return names


def _unknown(word: str, command: type, program: str) -> str:
    if not word.startswith("-"):
        hint = f"; write --{word.replace('=', ' ', 1)}" if "=" in word else ""
        return f"{program}: unexpected argument {word!r}{hint}"
    names = keys(command)
    options = sorted(
        {f"--{part.replace('_', '-')}" for name in names for part in (name, name.partition(".")[2]) if part}
    )
    option = word.partition("=")[0].replace("_", "-")
    return f"{program}: unknown option {word}{closest(option, options)}"


def _one_line(box: str) -> str:
    """tyro draws its complaints in a box of several lines: keep the text above the first rule."""
    lines = [line.strip("│ \t") for line in box.splitlines() if not re.match(r"\s*[╭╰]", line)]
    body = []
    for line in lines:
        if line.startswith("───"):
            break
        body.append(line)
    return " ".join(" ".join(body).split()) or "the command line could not be understood"
