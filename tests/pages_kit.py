"""The pages of the project: README, what stands beside it, and docs, by their path from the root."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
}
README = PAGES["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
