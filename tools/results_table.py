"""Print the tables of a demo's ``results.json`` as Markdown, for README and docs.

python tools/results_table.py docs/results/evidence/results.json
"""

import argparse
from collections.abc import Sequence

from vst.report import objective_rows, towers_rows
from vst.runs import read_json


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print both tables and the caption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", help="results.json of a run of vst demo")
    results = read_json(parser.parse_args().results)["results"]
    print(markdown(*towers_rows(results)), results["caption"], sep="\n\n")
    if len({f["objective"] for f in results["fits"]}) > 1:
        print("", markdown(*objective_rows(results)), sep="\n")


if __name__ == "__main__":
    main()
