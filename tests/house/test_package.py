"""What is built holds what the checkout holds, importing is light, and the index gets a page that stands alone."""

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from places import ROOT

BESIDE = ("configs", "pretrained")
"""Folders of the checkout that an installed package has inside it."""
OF_THE_WHEEL = tuple(f"{folder}/" for folder in ("nvae", *BESIDE))
MADE = ("__pycache__", "runs", "data", "build", "dist", "site")
"""What is in no commit, at the top of a checkout or in a folder of Python files."""
HEAVY = (
    "torch._dynamo", "torch._inductor", "sympy", "torchvision", "triton", "sklearn", "scipy", "matplotlib", "PIL",
    "lmdb", "tensorboard", "huggingface_hub", "torch_fidelity", "constriction", "wandb", "gradio", "onnx",
)  # fmt: skip
MODULES_WANTED = 250


def ours(path: Path) -> bool:
    """Whether a path, relative to the checkout, is of the project."""
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return not hidden and path.parts[0] not in MADE and not path.parts[0].endswith(".egg-info")


def checkout() -> set[str]:
    """Every file of the project but hidden ones."""
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if ours(path)}


def built(kind: str, source: Path, out: Path) -> Path:
    """The sdist or wheel of a folder; the network is not asked."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (file,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return file


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the source distribution unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in checkout():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    with tarfile.open(built("sdist", folder / "source", folder)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that is built from that."""
    return zipfile.ZipFile(built("wheel", sdist, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_the_source_distribution_is_the_checkout(sdist: Path) -> None:
    names = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    own = {name for name in names if name in ("PKG-INFO", "setup.cfg") or name.startswith("nvae.egg-info/")}
    assert names - own == checkout()


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: zipfile.ZipFile) -> None:
    inside = {
        name if name.startswith("nvae/") else f"nvae/{name}" for name in checkout() if name.startswith(OF_THE_WHEEL)
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == inside


def test_the_licence_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_every_command_is_installed(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    lines = wheel.read(name).decode().splitlines()
    commands = {file.stem for file in (ROOT / "nvae/commands").glob("*.py") if defines_main(file)}
    assert {line for line in lines if "=" in line} == {f"nvae-{name} = nvae.commands.{name}:main" for name in commands}


def defines_main(file: Path) -> bool:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)


def test_the_page_of_the_index_links_to_nothing_beside_it(metadata: Message) -> None:
    page = str(metadata.get_payload())
    assert page.startswith("# nvae\n") and "## Recipes" in page
    assert [link for link in page.split("](")[1:] if not link.startswith("https://")] == []
    assert "![" not in page


def test_the_python_versions_agree(metadata: Message) -> None:
    versions = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if "Python :: 3." in line]
    assert metadata["Requires-Python"] == f">={min(versions, key=lambda version: int(version[2:]))}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Some 0.3 s on top of PyTorch's own 1.8 s, where PyTorch's compiler alone would take 1.6 s."""
    code = "import sys, torch; before = set(sys.modules); import nvae; print(*set(sys.modules) - before)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    added = set(modules.stdout.split())
    assert "nvae.checkpoints.loading" in added
    assert [name for name in HEAVY if name in added] == []
    assert len(added) < MODULES_WANTED
