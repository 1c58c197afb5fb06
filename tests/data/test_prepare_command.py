"""scripts/prepare_data.py from the command line."""

import runpy
import sys
from pathlib import Path

import pytest
from places import ROOT
from stand_ins import image_folder
from tiny_run import train_in
from tiny_vqvae import GREY, first_config

SCRIPT = ROOT / "scripts" / "prepare_data.py"


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: object) -> int:
    """Runs the command in this process; its exit code."""
    before, sys.argv = sys.argv, ["prepare_data.py", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_prepare_verify_and_describe_in_one_go(capsys: pytest.CaptureFixture[str]) -> None:
    source = image_folder(Path("images"), [f"{i}.png" for i in range(12)])
    (source / "bad.png").write_bytes(b"")
    assert run("images", "store", "size=16", "--processes", 1, "--verify", "--describe") == 0
    printed = capsys.readouterr().out
    for words in ("bad.png: empty file", "every image is as it was written", "size      16×16", "bits/dim"):
        assert words in printed
    assert Path("contact_sheet.png").exists()


def test_a_store_is_verified_and_described_by_its_path_alone() -> None:
    image_folder(Path("images"), [f"{i}.png" for i in range(12)])
    assert run("images", "store", "size=16", "--processes", 1) == 0
    assert run("store", "--verify", "--describe", "sheet.png", "--processes", 1) == 0
    assert Path("sheet.png").exists()


def test_damage_is_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(Path("images"), [f"{i}.png" for i in range(12)])
    run("images", "store", "size=16", "--processes", 1)
    shard = Path("store/train-00000.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert run("store", "--verify", "--processes", 1) == 1
    assert "train-00000.safetensors" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("missing", "store") == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [["x"], ["x", "y", "z"]], ids=["nothing to do", "two outs"])
def test_what_is_to_be_done_must_be_said(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    assert "one OUT, --codes, --verify or --describe is needed" in capsys.readouterr().err


def test_describing_swallows_no_name_that_stands_behind_it() -> None:
    image_folder(Path("images"), [f"{i}.png" for i in range(12)])
    assert run("images", "--describe", "store", "size=16", "--processes", 1) == 0
    assert Path("store").is_dir() and Path("contact_sheet.png").exists()
    assert run("--describe", "store", "sheet.png") == 0
    assert Path("sheet.png").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--describe", "--fatal"], "--fatal: has no effect without OUT"),
        (["--describe", "--processes", 2], "--processes: has no effect here"),
    ],
)
def test_an_option_without_effect_is_refused(
    words: list[object], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(Path("images"), [f"{i}.png" for i in range(12)])
    assert run("images", *words) == 2
    assert sentence in capsys.readouterr().err
    assert not Path("contact_sheet.png").exists()


# --------------------------------------------------------------------------------------------------------------- codes


def test_codes_are_made_verified_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    train_in(Path("runs"), first_config(*GREY, "train.steps=1"))
    assert run("digits", "store", "--codes", "runs/tiny", "flip=true", "--processes", 1) == 0
    assert "of digits, made by runs/tiny" in capsys.readouterr().out
    assert run("store", "--verify", "--describe", "--processes", 1) == 0
    printed = capsys.readouterr().out
    assert "every image is as it was written" in printed and "test level 1, 4×4: " in printed
    shard = Path("store/test-00000.codes.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert run("store", "--verify", "--processes", 1) == 1


def test_codes_of_a_store_are_made_later() -> None:
    train_in(Path("runs"), first_config(*GREY, "train.steps=1"))
    assert run("digits", "store", "--processes", 1) == 0
    assert run("store", "--codes", "runs/tiny") == 0
    assert Path("store/codes.json").exists()


@pytest.mark.parametrize(
    ("options", "words", "message"),
    [
        ((), ("digits", "store"), "takes binarised images"),
        (GREY, ("images", "store", "size=16"), "takes images of 8×8 with 1 channels, store holds 16×16 with 3"),
        (GREY, ("images",), "images is no prepared store"),
        (GREY, ("digits", "store", "padding=2"), "padding: has no effect on preparing"),
    ],
    ids=["binarised", "other images", "no store", "a field without effect"],
)
def test_codes_that_cannot_be_are_refused_in_a_line(
    options: tuple[str, ...], words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(Path("images"), [f"{i}.png" for i in range(12)])
    train_in(Path("runs"), first_config(*options, "train.steps=1"))
    capsys.readouterr()
    assert run(*words, "--codes", "runs/tiny") == 2
    assert message in capsys.readouterr().err
