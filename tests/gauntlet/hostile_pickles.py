"""Pickles that call something, wherever a pickle can stand."""

import argparse
import builtins
import collections
import functools
import operator
import os
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import lmdb
import numpy as np
import torch
from tiny_run import tiny_run, train_in

from nvae.checkpoints.loading import load_model
from nvae.core.errors import UserError
from nvae.data.config import DataConfig
from nvae.data.sets import open_images
from nvae.training.folder import RunFolder

from .cases import Case, Result, Verdict

COMMAND = "touch trace"


class Calls:
    """Unpickled, it calls something."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def _payload(random: Random) -> Any:
    """Something that touches a file named trace when unpickled, or reads memory that is not its own."""
    code = f"__import__('os').system({COMMAND!r})"
    inner = pickle.dumps(Calls(os.system, COMMAND))
    payloads: tuple[Any, ...] = (
        Calls(os.system, COMMAND),
        Calls(builtins.eval, code),
        Calls(builtins.exec, code),
        Calls(subprocess.call, ["touch", "trace"]),
        Calls(functools.partial, os.system, COMMAND),
        Calls(operator.methodcaller, "system", COMMAND),
        Calls(pickle.loads, inner),
        Calls(torch.storage._load_from_bytes, inner),
        Calls(builtins.getattr, Calls(__import__, "os"), "system"),
        Calls(collections.OrderedDict, state={"items": Calls(os.system, COMMAND)}),
        Calls(builtins.open, "trace", "w"),
        Calls(torch._utils._rebuild_tensor_v2, torch.zeros(2).untyped_storage(), 0, (10**6,), (1,), False, {}),
        Calls(argparse.FileType("w"), "trace"),
    )
    return random.choice(payloads)


def _wrapped(random: Random, payload: Any) -> Any:
    """The payload somewhere in what a checkpoint may be."""
    return random.choice(
        (
            payload,
            [payload],
            {"model": payload},
            {payload.call[0].__name__ if hasattr(payload.call[0], "__name__") else "x": (1, [payload])},
            {"args": argparse.Namespace(dataset=payload), "state_dict": {}, "epoch": 0, "global_step": 0},
            collections.OrderedDict(a=torch.ones(2), b={"deep": [[payload]]}),
        )
    )


def prepare(material: Path) -> None:
    """A run of ours, whose checkpoints attacks are hidden in."""
    assert train_in(material, tiny_run("train.steps=2")) == "finished"


def _judged(case: Case, load: Callable[[], Any], names: str, tried: str) -> Result:
    """Nothing but a refusal will do."""
    try:
        load()
    except UserError as error:
        verdict = Verdict.REFUSED if names in str(error) else Verdict.BROKEN
        return Result(verdict, f"{tried}: {str(error)[:200]}")
    return Result(Verdict.LET_IN, f"{tried}: was loaded")


def checkpoint_that_calls(case: Case) -> Result:
    """PyTorch's archive, its earlier format, or a bare pickle of any protocol."""
    random, file = case.random, case.folder / "evil.pt"
    content = _wrapped(random, _payload(random))
    form = random.choice(("archive", "earlier", "bare"))
    if form == "bare":
        file.write_bytes(pickle.dumps(content, protocol=random.randrange(6)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "archive")
    return _judged(case, lambda: load_model(file), str(file), f"{form} {type(content).__name__}")


def our_checkpoint_that_calls(case: Case) -> Result:
    """A whole checkpoint of ours with one thing more in it, in a run that goes on."""
    random = case.random
    original = case.material / "tiny" / "checkpoints" / "step-000000002.pt"
    content = torch.load(original, weights_only=True)
    place = random.choice(("extra", "model", "config", "counters", "optimiser"))
    if place == "extra":
        content["extra"] = _payload(random)
    else:
        content[place][random.choice(("x", 0))] = _payload(random)
    file = case.folder / "tiny" / "checkpoints" / original.name
    file.parent.mkdir(parents=True)
    torch.save(content, file)
    load = random.choice((lambda: load_model(file), RunFolder(case.folder / "tiny").newest))
    return _judged(case, load, "checkpoints", place)


def archive_with_another_pickle(case: Case) -> Result:
    """The archive of a whole checkpoint, whose pickle was exchanged, or that has two."""
    random, file = case.random, case.folder / "evil.pt"
    original = case.material / "tiny" / "checkpoints" / "step-000000002.pt"
    evil = pickle.dumps(_payload(random), protocol=random.choice((0, 1, 2, 4)))
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(file, "w") as new:
        for part in old.infolist():
            is_pickle = part.filename.endswith("data.pkl")
            new.writestr(part.filename, evil if is_pickle else old.read(part))
        if random.random() < 0.5:
            new.writestr("archive/constants.pkl", evil)
            new.writestr("archive/code/__torch__.py", "import os\nos.system('touch trace')\n")
    return _judged(case, lambda: load_model(file), str(file), "exchanged pickle")


def opcodes(case: Case) -> Result:
    """Pickles written by hand, as no pickler writes them."""
    random, file = case.random, case.folder / "evil.pt"
    code = random.choice(
        (
            b"cos\nsystem\n(S'touch trace'\ntR.",
            b"\x80\x02cos\nsystem\nX\x0b\x00\x00\x00touch trace\x85R.",
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch trace\x85R.",
            b"(S'touch trace'\nios\nsystem\n.",
            b"(cos\nsystem\nS'touch trace'\no.",
            b"\x80\x02c__builtin__\neval\nX\x05\x00\x00\x001+1+1\x85R.",
            b"\x80\x02ctorch\nload\nX\x05\x00\x00\x00trace\x85R.",
            b"\x80\x02}X\x01\x00\x00\x00a" + b"2" * 100_000 + b".",
            b"(" * 1_000_000 + b".",
            b"\x80\x02X\xff\xff\xff\x7fa.",
            b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        )
    )
    if random.random() < 0.5:
        file.write_bytes(code)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", code)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    return _judged(case, lambda: load_model(file), str(file), repr(code[:30]))


def array_that_calls(case: Case) -> Result:
    """Arrays of objects, and pickles that are called arrays."""
    random, path = case.random, case.folder / random_name(case.random)
    payload = np.array([_payload(random)], dtype=object)
    if path.suffix == ".npy":
        np.save(path, payload, allow_pickle=True)
    else:
        np.savez(path, **{random.choice(("images", "test", "arr_0")): payload})
    if random.random() < 0.3:
        path.write_bytes(pickle.dumps(_payload(random)))
    return _judged(case, lambda: _read(path), str(path), path.suffix)


def random_name(random: Random) -> str:
    return random.choice(("set.npy", "set.npz"))


def database_that_calls(case: Case) -> Result:
    """An LMDB whose entries are pickles."""
    path, pickled = case.folder / "set.lmdb", pickle.dumps(_payload(case.random))
    with lmdb.open(str(path), map_size=2**20) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0", pickled)
        transaction.put(b"1", pickled + b" ")
    return _judged(case, lambda: _read(path), "set.lmdb", "lmdb")


def _read(path: Path) -> None:
    images = open_images(DataConfig(path=path, size=8, channels=3, holdout=1.0, workers=0), "test")
    images.read(range(len(images)))


ATTACKS = (
    checkpoint_that_calls,
    our_checkpoint_that_calls,
    archive_with_another_pickle,
    opcodes,
    array_that_calls,
    database_that_calls,
)
