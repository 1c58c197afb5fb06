"""Writes what scripts/gpu.sh measured into docs/performance.md, a section for each GPU.

    python scripts/gpu_report.py OUT [--page PAGE]

Between the page's markers, the section of the same GPU is replaced, those of others stay. What a CPU measured goes into
a page that is named only. `--tests` and `--run` are for gpu.sh.
"""

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- scripts/gpu_report.py writes from here -->", "<!-- to here -->"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
NOTHING = "Not measured."
Results = dict[str, Any]
"""What lies in OUT, by step."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="where gpu.sh left its results")
    parser.add_argument("--page", type=Path, help="default: docs/performance.md")
    parser.add_argument("--tests", type=Path, metavar="XML", help="prints what pytest counted, as JSON")
    parser.add_argument("--run", type=Path, metavar="RUN", help="prints how a run went, as JSON")
    args = parser.parse_args()
    if args.tests is not None:
        print(json.dumps(tested(args.tests)))
    elif args.run is not None:
        print(json.dumps(trained(args.run)))
    elif args.out is None or not any(args.out.glob("*.json")):
        print(f"error: {args.out or 'OUT'}: no results of scripts/gpu.sh there", file=sys.stderr)
        return 2
    else:
        return write(results_in(args.out), args.page)
    return 0


def write(results: Results, page: Path | None) -> int:
    """Puts the section into the page; the exit code."""
    on_gpu = any(finding["name"].startswith("cuda:") for finding in section_of(results, "devices"))
    if page is None and not on_gpu:
        print("error: these are not of a GPU; name a page with --page", file=sys.stderr)
        return 2
    page = page or PAGE
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text.partition(BEGIN)[2]:
        print(f"error: {page}: has not both markers, {BEGIN} and {END}", file=sys.stderr)
        return 2
    before, _, rest = text.partition(BEGIN)
    kept, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{merged(kept, report(results))}\n{END}{after}", encoding="utf-8")
    print(f"{page}: written")
    return 0


def merged(kept: str, section: str) -> str:
    """The sections of the page with this one, in place of that with the same heading."""
    sections = {
        part.partition("\n")[0]: part.strip() for part in re.split(r"(?m)^(?=### )", kept) if part[:4] == "### "
    }
    sections[section.partition("\n")[0]] = section.strip()
    return "\n\n".join(sections.values())


# ------------------------------------------------------------------------------------------------- what gpu.sh keeps


def tested(file: Path) -> Results:
    """The counts of pytest's XML, and the names of the tests that failed."""
    found: Results = {"passed": 0, "failed": [], "skipped": 0}
    for case in ElementTree.parse(file).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            found["failed"].append(f"{case.get('classname')}.{case.get('name')}")
        else:
            found["skipped" if "skipped" in outcomes else "passed"] += 1
    return found


def trained(run: Path) -> Results:
    """How a run stands: its outcome and, of its log, the numbers that were written last."""
    last: Results = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        last |= json.loads(line)
    outcome = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
    return {"outcome": outcome["outcome"], "last": last}


def results_in(out: Path) -> Results:
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))}


# ---------------------------------------------------------------------------------------------------------- the page


def section_of(results: Results, name: str) -> list[Results]:
    """The findings of a section of the doctor's report."""
    findings: list[Results] = results.get("doctor", {}).get("sections", {}).get(name, [])
    return findings


def report(results: Results) -> str:
    """The section of the device, in Markdown."""
    parts = [f"### {device(results)}", *filter(None, (updates(results), depthwise(results), kernels(results)))]
    parts += filter(None, (run(results), tests(results)))
    return "\n\n".join(parts)


def device(results: Results) -> str:
    """The name that benchmarks have of it, or the doctor's, with PyTorch's version."""
    for found in results.values():
        if "machine" in found:
            return f"{found['machine']['device']}, PyTorch {found['machine']['torch']}"
    names = [f["figures"]["name"] for f in section_of(results, "devices") if "name" in f["figures"]]
    versions = [f["figures"]["version"] for f in section_of(results, "versions") if "version" in f["figures"]]
    return ", ".join([*names[:1], *(f"PyTorch {version}" for version in versions)]) or "unknown device"


def updates(results: Results) -> str:
    """An update of each recipe in each precision, beside plain fp32 of the same run."""
    rows = []
    for step, found in results.items():
        if not step.startswith("update-"):
            continue
        recipe = Path(found["model"]).stem
        for batch, ways in found["train"].items():
            if batch.startswith("batch "):  # beside the peaks of products
                rows += [update_row(recipe, batch, way, figures) for way, figures in ways.items()]
    return table(["update", "batch", "how", "ms", "times as fast as plain fp32", "share of peak"], rows)


def update_row(recipe: str, batch: str, way: str, figures: dict[str, float]) -> list[str]:
    times = f"{figures['milliseconds']:.1f} ± {figures['spread']:.1f}"
    faster = f"{figures['faster']:.2f} ({figures['faster_least']:.2f}–{figures['faster_most']:.2f})"
    share = f"{figures['share_of_peak']:.0%}" if "share_of_peak" in figures else ""
    return [f"`{recipe}`", batch.removeprefix("batch "), way, times, faster, share]


def depthwise(results: Results) -> str:
    """Depthwise convolutions beside cuDNN's."""
    cases = results.get("depthwise", {}).get("depthwise", {})
    rows = [
        [case, way, f"{figures['milliseconds']:.2f}", f"{figures['faster']:.2f}"]
        for case, ways in cases.items()
        for way, figures in ways.items()
    ]
    return table(["depthwise, 5×5, both ways", "how", "ms", "times as fast as PyTorch's, channels-last"], rows)


def kernels(results: Results) -> str:
    """Every implementation, on small inputs."""
    rows = [[finding["name"], finding["words"]] for finding in section_of(results, "kernels")]
    return table(["implementation", "on small inputs"], rows)


def run(results: Results) -> str:
    """The last numbers of the run."""
    found = [results[step] for step in sorted(results) if step.startswith("training-")]
    if not found:
        return ""
    last = found[-1]["last"]
    names = ("step", "epoch", "nelbo", "images_per_second", "tflops", "share_of_peak", "peak_memory_mib", "non_finite")
    rows = [[name, f"{last[name]:.4g}"] for name in names if last.get(name) is not None]
    return table([f"training, {found[-1]['outcome']}", ""], rows)


def tests(results: Results) -> str:
    """What the tests that need a GPU said."""
    rows = []
    for step, found in results.items():
        if step.startswith("tests-"):
            failed = ", ".join(found["failed"]) or "none"
            rows.append([step.removeprefix("tests-"), str(found["passed"]), failed, str(found["skipped"])])
    return table(["tests", "passed", "failed", "skipped"], rows)


def table(names: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; nothing without rows."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


if __name__ == "__main__":
    sys.exit(main())
