"""Every script says what it does and what each of its options is."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import pytest
from command_line import command_line

FOLDER = Path(__file__).parents[2] / "scripts"
SCRIPTS = [path.stem for path in FOLDER.glob("*.py") if "command_line(__doc__)" in path.read_text()]


def test_there_are_scripts_and_none_has_a_parser_of_its_own():
    assert {"reproduce", "bench_ops", "flops"} < set(SCRIPTS)
    assert [path.stem for path in FOLDER.glob("*.py") if "ArgumentParser(" in path.read_text()] == ["command_line"]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_option_is_explained(name, monkeypatch):
    script, seen = import_module(name), []
    monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda parser, file=None: seen.append(parser))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert not ended.value.code
    (parser,) = seen
    assert parser.description == script.__doc__
    assert [action.dest for action in parser._actions if not action.help] == []


def test_defaults_stand_behind_options_that_have_one():
    parser = command_line("What it does,\n  line by line.")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 24], help="of STL")
    parser.add_argument("--out", default="a.json", help="JSON to write")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--minutes", type=float, help="stop after so many")
    shown = " ".join(parser.format_help().split())
    assert "What it does, line by line." in shown
    for words in (
        "of STL (default: 16 24)",
        "JSON to write (default: a.json)",
        "(default: 0)",
        "run nothing --minutes",
        "so many",
    ):
        assert words in shown
    assert shown.count("default") == 3
