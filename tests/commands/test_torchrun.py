"""Every `torchrun …` line of the documentation goes through torchrun's own parser, and then through ours."""

import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from places import ROOT
from torch.distributed.run import get_args_parser

PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.py"), *(ROOT / "nvae/commands").glob("*.py")]
LINE = re.compile(r"^ *(torchrun --[^`#\n\\]*(?:\\\n[^`#\n\\]*)*)", re.MULTILINE)
COMMANDS = ("train", "evaluate", "sample", "prepare", "convert", "encode", "benchmark")


def documented() -> list[str]:
    """The lines, those that go on behind a backslash joined."""
    lines = {line.replace("\\\n", " ").strip() for page in PAGES for line in LINE.findall(page.read_text("utf-8"))}
    return sorted(" ".join(line.split()) for line in lines)


def test_there_are_such_lines_of_every_command_that_takes_several_processes() -> None:
    text = "\n".join(documented())
    assert all(f"{name}.py" in text for name in ("train", "evaluate", "sample"))


@pytest.mark.parametrize("line", documented())
def test_a_documented_line_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = get_args_parser().parse_args(shlex.split(line)[1:])
    name = Path(ours.training_script).name.removesuffix(".py").removeprefix("nvae-")
    assert ours.nproc_per_node != "1" and name in COMMANDS
    monkeypatch.setattr(sys, "argv", [ours.training_script, *ours.training_script_args])
    import_module(f"nvae.commands.{name}").parse()


@pytest.mark.parametrize("name", ["train", "evaluate", "sample", "encode"])
def test_no_option_of_ours_is_one_that_torchrun_stumbles_over(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It looks for its own options, shortened ones too, behind the script as well."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    module = import_module(f"nvae.commands.{name}")
    with pytest.raises(SystemExit):
        module.parse()[0].print_help() or sys.exit() if name == "train" else module.parse()
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help", "--num"}
    assert len(options) >= 1
    for option in sorted(options):
        get_args_parser().parse_args([f"{name}.py", "run", option, "1"])
