"""Prepare a set once for fast loading, check a prepared one, or say what a set is like.

    %(prog)s SOURCE OUT [field=value ...] [--config CONFIG.yaml] [--fatal]
    %(prog)s OUT --codes RUN [flip=true]
    %(prog)s OUT --verify
    %(prog)s SOURCE --describe [SHEET.png]

SOURCE is a folder of images, a zip of them, an array, an LMDB, the folder of a set's download, or the name of a set.
OUT is what `data.path` then is. Fields are those of a config's data section: name=celeba_64 size=64. Run again after
an interruption to continue. `--codes` keeps the codes that the first stage of a VQ-VAE gives the images, for priors to
train on (data.stored_codes). Exit codes: 0 done, 1 --verify found damage, 2 something to fix (one line says what).
"""

import argparse
from pathlib import Path
from typing import NoReturn

from ..core.errors import UserError
from ..data.codes import code_lines, damaged_codes, has_codes
from ..data.description import describe
from ..data.preparation import prepare, read_config, require_words_used, verify
from ..data.store import is_store
from .arguments import natural
from .codes import write_codes
from .command import command


def main() -> NoReturn:
    """scripts/prepare_data.py and nvae-prepare."""
    command(run)


def run() -> int:
    """What was asked for on the command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("rest", nargs="*", metavar="OUT, field=value, SHEET.png")
    parser.add_argument("--config", type=Path, help="a recipe whose data section says name, size, crop, …")
    parser.add_argument("--processes", type=natural, help="how many work (default: one a processor)")
    parser.add_argument("--fatal", action="store_true", help="stop at the first bad image instead of leaving it out")
    parser.add_argument(
        "--codes", type=Path, metavar="RUN", help="keep the codes that this first stage gives the images"
    )
    parser.add_argument("--verify", action="store_true", help="read every image of the store again")
    parser.add_argument(
        "--describe",
        action="store_true",
        help="print counts and bits/dim of trivial models, write a contact sheet (default: contact_sheet.png)",
    )
    args = parser.parse_intermixed_args()
    sheets = [word for word in args.rest if args.describe and word.endswith(".png")]
    outs = [word for word in args.rest if "=" not in word and word not in sheets]
    if len(outs) > 1 or not (outs or args.codes or args.verify or args.describe):
        parser.error(f"one OUT, --codes, --verify or --describe is needed, found {' '.join(outs) or 'none'}")
    if args.fatal and not outs:
        raise UserError("--fatal: has no effect without OUT, only preparing leaves images out")
    if args.processes is not None and not (outs or args.verify):
        raise UserError("--processes: has no effect here, only on preparing and --verify")
    fields = [word for word in args.rest if "=" in word]
    require_words_used(fields, prepares=bool(outs), describes=bool(args.describe), codes=args.codes is not None)
    config = read_config(args.source, fields, args.config)
    store = config.source
    if outs:
        store = Path(outs[0])
        for line in prepare(config, store, processes=args.processes, fatal=args.fatal).lines():
            print(line)
    if args.codes is not None:
        if not is_store(store):
            raise UserError(f"--codes: {store} is no prepared store; name an OUT to prepare one")
        for line in write_codes(store, args.codes, config):
            print(line)
    if args.verify:
        damaged = [*verify(store, processes=args.processes), *(damaged_codes(store) if has_codes(store) else [])]
        print("\n".join(damaged) or f"{store}: every image is as it was written")
        if damaged:
            return 1
    if args.describe:
        sheet = Path(sheets[0] if sheets else "contact_sheet.png")
        print("\n".join(describe(config.model_copy(update={"path": store}), sheet).lines()))
        if args.codes is None and has_codes(store):
            print("\n".join(code_lines(store)))
        print(f"wrote {sheet}")
    return 0
