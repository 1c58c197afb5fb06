"""What a run of the gauntlet found: counts per group, as JSON and as the table of docs/reliability.md."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .cases import PASSED, Group, Verdict
from .running import Record

LAST_FULL_RUN = Path(__file__).with_name("last_full_run.json")
COLUMNS = (*PASSED, Verdict.LOST, Verdict.LET_IN, Verdict.BROKEN)


def found(group: Group, records: Iterable[Record], seconds: float) -> dict[str, Any]:
    """The entry of a group; `seconds` are those on the clock."""
    records = sorted(records, key=lambda record: record.number)
    counts = Counter(record.verdict for record in records)
    failures = [record for record in records if record.verdict not in PASSED]
    return {
        "what": group.what,
        "tried": len(records),
        **{verdict: counts[verdict] for verdict in COLUMNS},
        "seconds": round(seconds),
        "slowest": max((record.seconds for record in records), default=0.0),
        "mebibytes": max((record.mebibytes for record in records), default=0),
        "failures": [{"number": record.number, "verdict": record.verdict, "note": record.note} for record in failures],
    }


def failed(entry: dict[str, Any]) -> int:
    """How many cases of a group did not pass."""
    return sum(entry[verdict] for verdict in COLUMNS if verdict not in PASSED)


def table(entries: dict[str, dict[str, Any]]) -> str:
    """Markdown, a row for each group."""
    header = ("group", "what is tried", "tried", *COLUMNS)
    rows = [
        (f"`{name}`", entry["what"], *(f"{entry[column]:,}".replace(",", " ") for column in ("tried", *COLUMNS)))
        for name, entry in entries.items()
    ]
    lines = [header, ("---", "---", *("---:",) * (len(header) - 2)), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def read(path: Path) -> dict[str, Any]:
    """The results in a file; none where there is none."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return results


def write(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
