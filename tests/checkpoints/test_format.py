"""Checkpoint files: whole or not at all, and nothing but tensors and plain containers comes out of one."""

import argparse
import os
import pickle
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nvae.checkpoints.format import FORMAT, VERSION, is_ours, read_safely, save_checkpoint
from nvae.core.errors import UserError
from nvae.core.files import atomic_file, naming

CONTENT: dict[str, Any] = {
    "model": OrderedDict(weight=torch.arange(6.0).reshape(2, 3), half=torch.ones(3).bfloat16()),
    "step": 7,
    "plain": [1, 2.5, "x", None, True, (1, 2), {"nested": {"deep": [torch.tensor(3)]}}],
}
EARLIER_FORMAT = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "earlier format"])


class Attack:
    """Would run a command when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trace}",)


def complaint(path: Path, *allowed: type) -> str:
    """What read_safely says: one line that names the file."""
    with pytest.raises(UserError) as error:
        read_safely(path, allowed)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


# ---------------------------------------------------------------------------------------------------------- writing


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", CONTENT)
    content = read_safely(tmp_path / "a.pt")
    assert (content.pop("format"), content.pop("version")) == (FORMAT, VERSION)
    assert content.keys() == CONTENT.keys()
    assert torch.equal(content["model"]["weight"], CONTENT["model"]["weight"])
    assert content["model"]["half"].dtype == torch.bfloat16
    assert content["plain"][:6] == CONTENT["plain"][:6]


def test_a_saved_checkpoint_is_ours_and_another_is_not(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", CONTENT)
    assert is_ours(read_safely(tmp_path / "a.pt"))
    assert not is_ours(CONTENT)


def test_folders_are_made(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new" / "folder" / "a.pt", CONTENT)
    assert (tmp_path / "new" / "folder" / "a.pt").is_file()


def test_a_file_replaces_the_one_before(tmp_path: Path) -> None:
    for text in (b"first, longer", b"second"):
        with atomic_file(tmp_path / "a") as file:
            file.write(text)
    assert (tmp_path / "a").read_bytes() == b"second"


def test_until_it_is_whole_the_file_before_stays(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    with atomic_file(tmp_path / "a") as file:
        file.write(b"after")
        file.flush()
        assert (tmp_path / "a").read_bytes() == b"before"
    assert (tmp_path / "a").read_bytes() == b"after"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_file_before_and_no_other(tmp_path: Path, failure: type[BaseException]) -> None:
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(failure), atomic_file(tmp_path / "a") as file:
        file.write(b"half")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_what_cannot_be_saved_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(tmp_path / "a.pt", {"function": lambda: None})
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("flushed"))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("renamed"), replace(self, target))[1])
    with atomic_file(tmp_path / "a") as file:
        file.write(b"x")
    assert events == ["flushed", "renamed"]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


# ---------------------------------------------------------------------------------------------------------- refusing


@EARLIER_FORMAT
def test_nothing_is_executed(tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "trace"
    torch.save({"a": Attack(trace)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    message = complaint(tmp_path / "a.pt", argparse.Namespace)
    assert message.startswith("refused, it holds ")
    assert "system" in message
    assert not trace.exists()


def test_a_bare_pickle_is_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Attack(trace)))
    complaint(tmp_path / "a.pt")
    assert not trace.exists()


def test_nothing_is_executed_inside_an_allowed_type(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"args": argparse.Namespace(a=Attack(trace))}, tmp_path / "a.pt")
    assert complaint(tmp_path / "a.pt", argparse.Namespace).startswith("refused, it holds ")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (np.zeros(3), "numpy"),
        (Path("x"), "pathlib"),
        (argparse.Namespace(), "argparse.Namespace"),
    ],
    ids=["module", "array", "path", "namespace"],
)
def test_anything_but_tensors_and_containers_is_refused_by_name(tmp_path: Path, thing: Any, name: str) -> None:
    torch.save({"a": thing}, tmp_path / "a.pt")
    message = complaint(tmp_path / "a.pt")
    assert message.startswith(f"refused, it holds {name}")
    assert message.endswith("a checkpoint holds tensors and plain containers")


@EARLIER_FORMAT
def test_a_namespace_is_read_where_it_is_allowed(tmp_path: Path, zipped: bool) -> None:
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert read_safely(tmp_path / "a.pt", [argparse.Namespace])["args"].a == 1


def test_what_one_reading_allows_the_next_does_not(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    read_safely(tmp_path / "a.pt", [argparse.Namespace])
    assert complaint(tmp_path / "a.pt").startswith("refused, it holds argparse.Namespace")


# ----------------------------------------------------------------------------------------------------------- damage


@EARLIER_FORMAT
@pytest.mark.parametrize("kept", [0, 1, 2, 10, 100, 0.3, 0.6, 0.99, -1])
def test_a_truncated_checkpoint_says_so(tmp_path: Path, kept: float, zipped: bool) -> None:
    torch.save({"a": torch.randn(3000)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    assert complaint(tmp_path / "a.pt") == "damaged or truncated, or not a checkpoint"


def same(a: Any, b: Any) -> bool:
    """The same values and tensors, whatever the bits of the file."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else bool(a == b)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_flipped_bit_is_told_wherever_it_changes_anything(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    save_checkpoint(file, {"model": {"weight": torch.arange(6.0), "bias": torch.ones(3)}, "step": 7})
    whole, before = file.read_bytes(), read_safely(file)
    told = 0
    for place in range(0, len(whole), 5):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            assert same(read_safely(file), before), f"byte {place} of {len(whole)}"
        except UserError:
            told += 1
    assert told > 0.4 * len(whole) / 5  # the rest is padding and unused fields of the archive


def test_flipped_weights_are_told_by_the_name_of_their_part(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {"model": {"weight": torch.full((1000,), 3.0)}})
    whole = bytearray((tmp_path / "a.pt").read_bytes())
    whole[whole.index(np.full(1000, 3.0, np.float32).tobytes()) + 2001] ^= 1
    (tmp_path / "a.pt").write_bytes(whole)
    assert complaint(tmp_path / "a.pt") == "damaged, 'archive/data/0' in it is not as it was written"


def test_a_checkpoint_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read_safely(tmp_path / "a.pt")["a"], torch.ones(3))


def test_a_full_disk_is_named_by_the_file_and_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which PyTorch's writer turns into an error about positions."""

    @contextmanager
    def full(path: Path) -> Iterator[Any]:
        with Path("/dev/full").open("wb", buffering=0) as file, naming(path):
            yield file

    monkeypatch.setattr("nvae.checkpoints.format.atomic_file", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        save_checkpoint(tmp_path / "a.pt", CONTENT)
    assert error.value.filename == str(tmp_path / "a.pt")


def lines(path: Path) -> None:
    path.write_text("model:\n  family: nvae\n" * 20)


def picture(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))


def array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def noise(path: Path) -> None:
    path.write_bytes(np.random.RandomState(0).bytes(5000))


@pytest.mark.parametrize("write", [lines, picture, array, noise])
def test_a_file_of_another_kind_says_so(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "a.pt")
    assert complaint(tmp_path / "a.pt") == "damaged or truncated, or not a checkpoint"


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    assert complaint(tmp_path / "a.pt") == "no such checkpoint"


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert complaint(tmp_path) == "no such checkpoint"


@pytest.mark.parametrize("thing", [[1, 2], torch.zeros(3)], ids=["list", "Tensor"])
def test_what_is_no_dict_is_no_checkpoint(tmp_path: Path, thing: Any) -> None:
    torch.save(thing, tmp_path / "a.pt")
    assert complaint(tmp_path / "a.pt") == f"not a checkpoint (holds a {type(thing).__name__})"
