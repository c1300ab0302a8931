"""From the words a person typed to a dataclass; every complaint is one line."""

import contextlib
import dataclasses
import io
import math
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
    """The words for `command`, each option with its value or its values, and those for another program."""
    ours, theirs, taking = list[str](), list[str](), 0.0  # words that the option takes, itself among them
    options = {f"--{key.rpartition('.')[2].replace('_', '-')}": kind for key, kind in keys(command).items()}
    options |= {f"--no-{name[2:]}": kind for name, kind in options.items() if kind is bool}
    options |= {"-h": bool, "--help": bool}
    for word in argv:
        name, has_value = word.partition("=")[0].replace("_", "-"), "=" in word
        if name in options:
            is_list = typing.get_origin(options[name]) is tuple
            taking = math.inf if is_list else 1 if has_value or options[name] is bool else 2
        else:
            is_next = word.startswith("-") and taking == math.inf  # a list ends where the next option begins
            taking = 0 if is_next else max(taking - 1, 0)
        (ours if taking else theirs).append(word)
    return ours, theirs


def check_folder(path: Path) -> Path:
    """The same path, of a folder that is there or may be made; UserError for a file."""
    first = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not first.is_dir():
        raise UserError(f"{first} is not a folder; name another")
    return path


def share(part: str) -> tuple[int, int]:
    """K and N of `K/N`, the K-th of N shares, counted from 0."""
    match = re.fullmatch(r"(\d+)/(\d+)", part, re.ASCII)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--part is {part!r}; write K/N with K from 0 to N-1, as 3/16")
    return int(match[1]), int(match[2])


def keys(command: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a nested dataclass, and its type."""
    kinds: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(command).items():
        kinds |= keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return kinds


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
