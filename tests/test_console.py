"""Progress: bars for a person, a line now and then for a log, nothing for --json in a log."""

import io

import pytest

pytest.importorskip("rich")

from dijiang import console
from rich.console import Console


def terminal(*, person: bool, **options) -> tuple[console.Terminal, io.StringIO]:
    out = io.StringIO()
    made = console.Terminal(**options)
    made.console = Console(file=out, force_terminal=person, width=100, highlight=False)
    return made, out


def test_bars_for_a_person():
    reporter, out = terminal(person=True)
    with reporter.stage("counting") as progress:
        for done in range(1, 4):
            progress(done, 3)
    text = out.getvalue()
    assert "3/3" in text and "counting: done in" in text


def test_lines_for_a_log():
    reporter, out = terminal(person=False, every=0.0)
    with reporter.stage("counting") as progress:
        progress(1, 3)
        progress(3, 3)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines[:3] == ["counting ...", "counting: 1 of 3", "counting: 3 of 3"]
    assert lines[3].startswith("counting: done in")


def test_a_log_is_not_flooded():
    reporter, out = terminal(person=False, every=60.0)
    with reporter.stage("counting") as progress:
        for done in range(1000):
            progress(done, 1000)
    assert len(out.getvalue().splitlines()) == 2


def test_names_with_brackets_stay_as_they_are():
    reporter, out = terminal(person=False)
    reporter.say("[red]x[/red]")
    assert out.getvalue() == "[red]x[/red]\n"
    reporter, out = terminal(person=True)
    with reporter.stage("notes[1].txt") as progress:
        progress(1, 1)
    assert "notes[1].txt" in out.getvalue()


def test_error_is_one_line(capsys):
    console.error_line("first\n\n  second\n")
    assert capsys.readouterr().err == "error: first second\n"
    console.error_line("")
    assert capsys.readouterr().err == "error: failed\n"


def test_silent_says_nothing(capsys):
    reporter = console.Silent()
    with reporter.stage("x") as progress:
        progress(1, 1)
    reporter.say("x")
    assert capsys.readouterr() == ("", "")


def test_table_columns_stand_under_each_other():
    assert console.table(["model", "x"], [["a", "1.25"], ["longer name", "3"]]).split("\n") == [
        "model           x",
        "a            1.25",
        "longer name     3",
    ]
