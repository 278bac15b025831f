"""The tests that need a GPU: all that are marked ``cuda``, with what became of each written down as it comes."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from gpu_steps.work import ROOT, Incomplete, Skipped, Work, clean
from vst.results.folders import read_json, write_json

_LAST = ("test_runtimes.py", "test_execution.py", "test_fit_on_devices.py")  # what compiles, and processes: the longest
_ASKS = re.compile(r"\b(cuda|device)\b")  # by the marker, or by the fixture whose GPU half is marked


class Recorder:
    """Writes down every test's outcome, atomically after each, so that a time limit loses none of them."""

    def __init__(self, work: Work) -> None:
        self.work, self.errors = work, []  # type: ignore[var-annotated]
        self.tests: dict[str, dict[str, Any]] = {}
        path = work.out / "results.json"
        if path.is_file():  # of a call before this one: what passed then is not run again
            before = read_json(path)["tests"]
            self.tests = {name: test for name, test in before.items() if test["outcome"] == "passed"}

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out what passed before."""
        done = [item for item in items if item.nodeid in self.tests]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in self.tests]

    def counts(self) -> Counter[str]:
        """Tests by outcome."""
        return Counter(test["outcome"] for test in self.tests.values())

    def told(self) -> str:
        """The counts in a line."""
        counts = self.counts()
        parts = [f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped") if counts[kind]]
        errors = [f"{len(self.errors)} files could not be read"] if self.errors else []
        return ", ".join([*parts, *errors]) or "no test was found"

    def pytest_collectreport(self, report: Any) -> None:
        """A file that could not be imported."""
        if report.failed:
            self.errors.append(report.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of a test; a failed one counts, whichever it is."""
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            test |= {"outcome": "failed", "phase": report.when}
            test["said"] = clean(str(crash.message if crash else report.longrepr).splitlines()[0])[:300]
        elif report.skipped:
            test |= {"outcome": "skipped", "said": clean(str(report.longrepr[-1]))[:300]}
        if report.when == "teardown":
            self.write()

    def write(self) -> None:
        """What is known so far."""
        results = {"counts": dict(self.counts()), "files that could not be read": self.errors, "tests": self.tests}
        write_json(self.work.out / "results.json", results)
        self.work.say(self.told())


def run(work: Work) -> str:
    """Run them; without a GPU they are found and skipped."""
    try:
        import pytest
    except ImportError:
        raise Skipped("pytest is not installed") from None
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _ASKS.search(path.read_text())]
    files = [str(path) for path in sorted(found, key=lambda path: path.name in _LAST)]
    recorder = Recorder(work)
    words = ["-m", "cuda", "-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    # What pyproject.toml says of plugins that are not installed brings a warning and nothing else.
    status = pytest.main([*words, f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"), *files], plugins=[recorder])
    recorder.write()
    none_left = status == pytest.ExitCode.NO_TESTS_COLLECTED and recorder.tests
    if not recorder.tests or recorder.errors or recorder.counts()["failed"] or (status != 0 and not none_left):
        raise Incomplete(recorder.told())
    return recorder.told()
