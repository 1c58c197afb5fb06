"""From a config to a run: sections that agree, batches that come out even, commands that end with the right code."""

import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from tiny_run import TINY, checkpoint, column, outcome, tiny_run, train_in

from nvae.commands import command
from nvae.core import distributed
from nvae.core.config import dump_yaml, validate
from nvae.core.errors import UserError
from nvae.core.precision import allow_tf32, precision_on
from nvae.data.config import DataConfig
from nvae.training.config import load_run, read_run_config, run_config
from nvae.training.continuation import with_global_batch

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- sections


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.image_size=16"], "model.image_size: is 16, but data.size=8 and data.padding=0 make 8"),
        (["data.padding=2"], "model.image_size: is 8, but data.size=8 and data.padding=2 make 12"),
        (["data.padding=2", "model.image_size=12"], "model.likelihood.border: is 0, but data.padding is 2"),
        (["data.binarize=false"], "data.binarize: is false, model.likelihood.kind is bernoulli"),
    ],
)
def test_sections_that_do_not_agree_are_told_apart(overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        tiny_run(*overrides)
    assert sentence in str(error.value)


def test_a_run_is_named_after_its_recipe() -> None:
    assert read_run_config(ROOT / "configs" / "debug.yaml", []).name == "debug"
    assert read_run_config(ROOT / "configs" / "debug.yaml", ["name=mine"]).name == "mine"


def test_the_family_of_a_config_decides_its_fields() -> None:
    with pytest.raises(UserError, match=r"model\.encoder_channels: unknown field"):
        run_config({**TINY, "model": {**TINY["model"], "family": "vdvae"}}, "tiny")
    with pytest.raises(UserError, match=r"model\.family: unknown family 'nvea'; did you mean 'nvae'\?"):
        run_config({**TINY, "model": {"family": "nvea"}}, "tiny")


# ----------------------------------------------------------------------------------------------------------- batches


def shared(processes: int, before: int | None = None, **fields: int) -> tuple[int | None, int]:
    data = with_global_batch(validate(DataConfig, {"name": "digits", **fields}, "data"), before, processes)
    return data.global_batch, data.batch


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"processes": 4, "batch": 8}, (32, 8)),
        ({"processes": 1, "batch": 8, "global_batch": 32}, (32, 8)),
        ({"processes": 8, "batch": 8, "global_batch": 32}, (32, 4)),
        ({"processes": 1, "batch": 8, "before": 32}, (32, 8)),
        ({"processes": 4, "batch": 16, "before": 32}, (32, 8)),
        ({"processes": 2, "batch": 8, "global_batch": 64, "before": 32}, (64, 8)),
    ],
)
def test_the_global_batch_is_given_or_kept_or_follows_from_the_processes(
    arguments: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert shared(**arguments) == expected


def test_shares_that_are_uneven_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.global_batch: 32 images cannot be shared evenly by 3 processes"):
        shared(3, batch=8, global_batch=32)
    with pytest.raises(UserError, match=r"a process takes 36 of 72 images.*passes of 8.*data\.batch=6 would do"):
        shared(2, batch=8, global_batch=72)


def test_batches_are_printed_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_in(tmp_path, tiny_run("data.global_batch=64", "train.steps=1"))
    assert "64 images per update (32 per process and pass)" in capsys.readouterr().out
    config = load_run(tmp_path / "tiny")
    assert (config.data.global_batch, config.data.batch) == (64, 32)


def test_the_learning_rate_follows_the_global_batch_where_asked(tmp_path: Path) -> None:
    options = ["optim.warmup_steps=0", "optim.schedule=constant", "train.steps=1"]
    train_in(tmp_path, tiny_run(*options, "optim.lr_batch=16", "data.global_batch=64"))
    assert column(tmp_path / "tiny", "learning_rate") == pytest.approx([1e-2 * 64 / 16])


def test_the_length_of_training_is_given_in_epochs_or_updates(tmp_path: Path) -> None:
    train_in(tmp_path, tiny_run("train.steps=null", "train.epochs=0.05"))
    assert checkpoint(tmp_path / "tiny")["counters"]["step"] == 3  # 0.05 · 1500 / 32, rounded up


# ------------------------------------------------------------------------------------------------- precision, devices


@pytest.mark.parametrize(("has_bf16", "mixed"), [(True, "bf16"), (False, "fp16")])
def test_mixed_is_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch, has_bf16: bool, mixed: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert precision_on(CUDA, "mixed") == mixed
    assert precision_on(CPU, "mixed") == "fp32"


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(UserError, match=r"train\.precision: Tesla V100 has no bf16; use fp16 or mixed"):
        precision_on(CUDA, "bf16")


def test_tf32_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    for device in (CPU, CUDA):
        with pytest.raises(UserError, match=r"train\.precision: tf32 needs a CUDA device of compute capability 8\.0"):
            precision_on(device, "tf32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert precision_on(CUDA, "tf32") == "tf32"


def test_tf32_is_an_option_and_off_otherwise() -> None:
    allow_tf32("tf32")
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.allow_tf32
    allow_tf32("fp32")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


def test_cuda_where_there_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"train\.device: cuda was asked for"):
        train_in(tmp_path, tiny_run("train.device=cuda"))


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"process 2 of this machine finds 2 CUDA devices"):
        distributed.start(torch.device("cuda"), timeout_minutes=1)


# ---------------------------------------------------------------------------------------------------------- commands


def call_train_py(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """The exit code of train.py, started in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(dump_yaml(tiny_run("name=mine", "train.steps=2")))
    return "mine.yaml"


def test_training_ends_with_code_0(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call_train_py(monkeypatch, tmp_path, recipe, "train.steps=1") == 0
    assert checkpoint(tmp_path / "runs" / "mine")["counters"]["step"] == 1


def test_a_mistake_ends_with_code_2_and_one_line(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_train_py(monkeypatch, tmp_path, recipe, "optim.clip_nrm=1") == 2
    said = capsys.readouterr().err
    assert "optim.clip_nrm: unknown field; did you mean 'clip_norm'?" in said
    assert "Traceback" not in said


def test_an_interruption_ends_with_code_75(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored: list[bool] = []
    monkeypatch.setattr(command, "ignore_signals", lambda: ignored.append(True))
    with pytest.raises(SystemExit) as ended:
        command.command(lambda: command.EXIT_INTERRUPTED)
    assert ended.value.code == 75
    assert ignored == [True]


def test_what_would_run_is_shown_and_nothing_is_made(
    tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_train_py(monkeypatch, tmp_path, recipe, "--dry-run") == 0
    assert "images per update: 32 (32 per process and pass)" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def files_of(run: Path) -> dict[Path, bytes]:
    """What lies in a run's folder, but for its lock."""
    return {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.lr=0.5"],
        ["optim.name=adamw", "allow_changes=true"],
        ["model.groups=3", "allow_changes=true"],
        ["data.global_batch=33"],
        ["data.name=images", "data.path=nowhere", "allow_changes=true"],
        ["train.precision=fp16"],
        ["train.init_from=nowhere", "model.groups=3", "allow_changes=true"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_command_that_is_refused_leaves_every_file_of_a_run_as_it_was(finished: Path, overrides: list[str]) -> None:
    before = files_of(finished / "tiny")
    with pytest.raises(UserError):
        train_in(finished, tiny_run("train.steps=1", *overrides))
    assert files_of(finished / "tiny") == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    train_in(folder, tiny_run("train.steps=1"))
    return folder


def test_weights_of_another_model_are_told_by_the_fields_that_make_it_another(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"another model than the config describes: '[^']*'[^\n]*\n  model\.groups: 2 → 3$"
    ):
        train_in(finished, tiny_run("train.steps=1", "model.groups=3", "allow_changes=true"))
    with pytest.raises(UserError, match=r"^train\.init_from: the weights are.*\n  model\.groups: 2 → 3$"):
        train_in(tmp_path, tiny_run(f"train.init_from={finished / 'tiny'}", "model.groups=3"))


def test_a_refusal_is_written_down_where_no_run_has_begun(tmp_path: Path) -> None:
    for name in ("nowhere", "elsewhere"):
        with pytest.raises(UserError, match=name):
            train_in(tmp_path, tiny_run(f"train.init_from={name}"))
        assert name in outcome(tmp_path / "tiny")["message"]
    train_in(tmp_path, tiny_run("train.steps=1"))
    assert outcome(tmp_path / "tiny")["outcome"] == "finished"


def test_a_full_disk_ends_a_run_with_the_file_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*args: Any) -> None:
        raise OSError(28, "No space left on device", "step.pt")

    monkeypatch.setattr("nvae.training.folder.save_checkpoint", save)
    with pytest.raises(OSError, match="No space"):
        train_in(tmp_path, tiny_run())
    assert outcome(tmp_path / "tiny")["message"] == "rank 0: step.pt: No space left on device"


def test_signals_are_the_callers_again_afterwards(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    train_in(tmp_path, tiny_run("train.steps=1"))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_the_config_of_a_run_is_found_from_its_folder_and_its_checkpoints(tmp_path: Path) -> None:
    train_in(tmp_path, tiny_run("train.steps=1"))
    folder = tmp_path / "tiny"
    expected = tiny_run("train.steps=1", "data.global_batch=32")
    assert load_run(folder) == expected
    assert load_run(folder / "checkpoints" / "best.pt") == expected
