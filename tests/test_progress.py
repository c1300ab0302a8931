"""What is said while one waits: on a terminal, and elsewhere."""

import pytest

from sega_dist import progress


@pytest.mark.parametrize("is_terminal", [True, False])
def test_count_speed_and_note_are_shown(is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.progress("searching", 20, "steps") as advance:
        advance(10, "loss 0.5")
        advance(10)
    said = capsys.readouterr()
    assert not said.out
    for part in ("searching", "20", "steps/s", "loss 0.5"):
        assert part in said.err


def test_what_an_earlier_life_did_makes_no_speed(capsys: pytest.CaptureFixture[str]):
    """90 of 100 in 90 seconds, then one: about one a second, and ten to come."""
    with progress.progress("searching", 100, "steps") as advance:
        advance(90, seconds=90.0)
        advance(0, "loss 1")
    assert "90 / 100 steps, 1 steps/s, 10 s left" in capsys.readouterr().err
