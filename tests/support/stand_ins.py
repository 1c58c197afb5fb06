"""Small sets laid out exactly as the real ones are downloaded, and single files of every kind."""

import gzip
import hashlib
import pickle
import struct
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torchvision
from PIL import Image

Array = np.ndarray[Any, np.dtype[np.uint8]]


def noise(*shape: int, seed: int = 0) -> Array:
    """Random bytes."""
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """An RGB picture that any filter can resize without surprises."""
    return Image.fromarray(noise(4, 4, 3, seed=seed)).resize((width, height), Image.Resampling.BICUBIC)


def file_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_folder(root: Path, names: Iterable[str], size: int = 32) -> Path:
    """PNG files, each of other pixels."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(file_bytes(smooth(size, size, seed)))
    return root


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def write_lmdb(path: Path, entries: dict[bytes, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


def published_lmdb(path: Path, values: Iterable[bytes]) -> Path:
    """As made for the published code: keys are decimal positions (spec §8)."""
    return write_lmdb(path, {b"%d" % i: value for i, value in enumerate(values)})


def mnist(root: Path, train: int = 12, test: int = 6) -> Path:
    """The four IDX files under MNIST/raw, gzipped as downloaded and unpacked as torchvision leaves them."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for seed, (name, count) in enumerate({"train": train, "t10k": test}.items()):
        images = struct.pack(">IIII", 2051, count, 28, 28) + noise(count, 28, 28, seed=seed).tobytes()
        labels = struct.pack(">II", 2049, count) + bytes(count)
        for kind, content in {"images-idx3": images, "labels-idx1": labels}.items():
            (raw / f"{name}-{kind}-ubyte").write_bytes(content)
            (raw / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    return root


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch, per_batch: int = 4) -> Path:
    """The pickled batches, with torchvision's checksums exchanged for theirs."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums = {}
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        batch = {"data": noise(per_batch, 3072, seed=seed), "labels": [0] * per_batch}
        sums[name] = _write_hashed(folder / name, pickle.dumps(batch))
    meta = _write_hashed(folder / "batches.meta", pickle.dumps({"label_names": ["one"]}))
    dataset = torchvision.datasets.CIFAR10
    monkeypatch.setattr(dataset, "train_list", [[n, sums[n]] for n in sums if n != "test_batch"])
    monkeypatch.setattr(dataset, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(dataset, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    return root


def _write_hashed(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def omniglot(root: Path, train: int = 10, test: int = 4) -> Path:
    """chardata.mat: one image a column, itself column by column."""
    import scipy.io

    root.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for seed, (key, count) in enumerate({"data": train, "testdata": test}.items()):
        images = noise(count, 28, 28, seed=seed)
        arrays[key] = images.swapaxes(1, 2).reshape(count, 784).T / 255
    scipy.io.savemat(root / "chardata.mat", arrays)
    return root


def imagenet_npz(root: Path, size: int, batches: int = 11, per_batch: int = 3) -> Path:
    """The down-sampled batches of image-net.org: planar rows, labels and a mean."""
    for folder, names in {
        f"Imagenet{size}_train_npz": [f"train_data_batch_{i}.npz" for i in range(1, batches + 1)],
        f"Imagenet{size}_val_npz": ["val_data.npz"],
    }.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            rows = noise(per_batch, 3 * size**2, seed=len(list(root.rglob("*.npz"))))
            labels = np.ones(per_batch, dtype=np.int64)
            np.savez_compressed(root / folder / name, data=rows, labels=labels, mean=rows.mean(0))
    return root


def celeba(root: Path, pack: bool = False) -> Path:
    """The aligned images and the official list of splits; as torchvision lays them out, or with the zip packed."""
    folder = root / "celeba"
    names = [f"{i:06d}.jpg" for i in range(1, 9)]
    images = {name: file_bytes(smooth(218, 178, i), "JPEG", quality=95) for i, name in enumerate(names)}
    folder.mkdir(parents=True)
    if pack:
        zipped(folder / "img_align_celeba.zip", {f"img_align_celeba/{n}": data for n, data in images.items()})
    else:
        (folder / "img_align_celeba").mkdir()
        for name, data in images.items():
            (folder / "img_align_celeba" / name).write_bytes(data)
    splits = [0, 0, 0, 0, 1, 1, 2, 2]
    lines = (f"{name} {split}\n" for name, split in zip(names, splits, strict=True))
    (folder / "list_eval_partition.txt").write_text("".join(lines))
    return root


def lsun(root: Path, category: str) -> Path:
    """The LMDBs of a category: keys are hashes, values WebP files whose shorter side is 256."""
    for part, count in {"train": 5, "val": 3}.items():
        pictures = [smooth(256, 300 + 20 * i, i) for i in range(count)]
        entries = {hashlib.sha1(b"%d" % i).hexdigest().encode(): file_bytes(p, "WEBP") for i, p in enumerate(pictures)}
        write_lmdb(root / f"{category}_{part}_lmdb", entries)
    return root
