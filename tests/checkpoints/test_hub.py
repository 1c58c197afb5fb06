"""push_to_hub and from_pretrained, against a stand-in for the Hugging Face hub."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_folders import FAMILIES, model_of, same_weights, shared
from stand_in_hub import Hub, digest_of, hub

import nvae
from nvae.checkpoints.model_folder import CONFIG, WEIGHTS
from nvae.core.errors import UserError
from nvae.models.base import Family

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub that huggingface_hub, imported anew, takes for the one."""
    with hub() as server, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            patch.delitem(sys.modules, name)
        patch.setenv("HF_ENDPOINT", server.address)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield server
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]


@pytest.fixture
def there(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The hub, empty; nothing was fetched from it."""
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    server.repositories, server.objects, server.private, server.down = {}, {}, set(), False
    shutil.rmtree(cache(), ignore_errors=True)
    return server


def cache() -> Path:
    """Where what was fetched is kept."""
    return Path(os.environ["HF_HOME"]) / "hub"


@pytest.fixture
def model() -> Family[Any]:
    return model_of(FAMILIES["very deep"])


@pytest.fixture
def folder(model: Family[Any], tmp_path: Path) -> Path:
    folder = shared(tmp_path / "model", model)
    (folder / "README.md").write_text("---\nlibrary_name: nvae\n---\n")
    return folder


def complaint(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_pushed_is_what_loads_to_the_last_bit(there: Hub, folder: Path, model: Family[Any]) -> None:
    assert nvae.push_to_hub(folder, "me/model") == f"{there.address}/me/model"
    assert same_weights(nvae.from_pretrained("me/model"), model)


def test_earlier_commits_stay_within_reach(there: Hub, folder: Path, model: Family[Any], tmp_path: Path) -> None:
    nvae.push_to_hub(folder, "me/model")
    later = shared(tmp_path / "later", model_of(FAMILIES["very deep"]))
    nvae.push_to_hub(later, "me/model")
    assert not same_weights(nvae.from_pretrained("me/model"), model)
    earlier = digest_of(there.repositories["me/model"][1])
    assert same_weights(nvae.from_pretrained("me/model", revision=earlier), model)


def test_a_model_that_was_fetched_loads_without_a_hub(there: Hub, folder: Path, model: Family[Any]) -> None:
    nvae.push_to_hub(folder, "me/model")
    nvae.from_pretrained("me/model")
    there.down = True
    assert same_weights(nvae.from_pretrained("me/model"), model)


def test_only_what_a_model_folder_has_is_pushed(there: Hub, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    nvae.push_to_hub(folder, "me/model")
    assert there.repositories["me/model"][-1].keys() == {".gitattributes", "README.md", CONFIG, WEIGHTS}


def test_what_a_folder_no_longer_has_is_gone_there_too(there: Hub, folder: Path) -> None:
    (folder / "sampler.pt2").write_bytes(b"earlier")
    nvae.push_to_hub(folder, "me/model")
    (folder / "sampler.pt2").unlink()
    nvae.push_to_hub(folder, "me/model")
    assert ["sampler.pt2" in files for files in there.repositories["me/model"]] == [False, True, False]


def test_only_what_is_read_is_fetched(there: Hub, folder: Path) -> None:
    (folder / "sampler.pt2").write_bytes(b"a program")
    nvae.push_to_hub(folder, "me/model")
    there.repositories["me/model"][-1]["evil.py"] = b"raise SystemExit"
    nvae.from_pretrained("me/model")
    fetched = {file.name for file in cache().glob("models--me--model/snapshots/*/*")}
    assert fetched == {"README.md", CONFIG, WEIGHTS}


def test_a_private_one_is_private(there: Hub, folder: Path) -> None:
    nvae.push_to_hub(folder, "me/model", private=True)
    assert there.private == {"me/model"}


def test_nothing_private_goes_where_everybody_reads(there: Hub, folder: Path) -> None:
    there.repositories["me/model"] = [{".gitattributes": b""}]
    assert "is there already and is public" in complaint(nvae.push_to_hub, folder, "me/model", private=True)
    assert len(there.repositories["me/model"]) == 1 and not there.objects


def test_a_damaged_model_is_not_pushed(there: Hub, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    assert "damaged or truncated" in complaint(nvae.push_to_hub, folder, "me/model")
    assert not there.repositories


def test_a_model_that_is_not_there_is_named(there: Hub) -> None:
    assert complaint(nvae.from_pretrained, "me/model").startswith(
        "me/model: the hub: 404 Client Error. Repository Not F"
    )


def test_a_revision_that_is_not_there_is_named(there: Hub, folder: Path) -> None:
    nvae.push_to_hub(folder, "me/model")
    said = complaint(nvae.from_pretrained, "me/model", revision="v7")
    assert said.startswith("me/model: the hub: 404 Client Error. Revision Not Found")


def test_what_is_no_model_of_this_package_is_named(there: Hub) -> None:
    there.repositories["me/other"] = [{"README.md": b"", "model.bin": b""}]
    assert complaint(nvae.from_pretrained, "me/other").startswith(
        "me/other: is on the hub, but has no model.safetensors"
    )


def test_without_a_token_nothing_is_pushed(there: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    said = complaint(nvae.push_to_hub, folder, "me/model")
    assert said.startswith("me/model: the hub: ") and "401" in said and said.endswith("hf auth login")
    assert not there.repositories


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/mod el", "../model"])
def test_a_name_that_is_none_is_refused_before_anything_is_done(folder: Path, name: str) -> None:
    assert complaint(nvae.push_to_hub, folder, name) == f"{name}: no repository of the hub; its name is user/name"


def test_a_card_has_its_own_licence(folder: Path) -> None:
    assert complaint(nvae.push_to_hub, folder, "me/model", licence="mit").startswith("licence: has no effect")


def test_without_its_package_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert complaint(nvae.from_pretrained, "me/model").endswith("is not installed; pip install 'nvae[hub]'")
