"""One step in a process of its own: ``python -m gpu_steps STEP --out FOLDER --scratch FOLDER [--dry-run]``."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from pathlib import Path

from gpu_steps.work import Incomplete, Skipped, Work, sentence


def main() -> None:
    """Run the step; its last word is left in the scratch folder, and tracebacks go to stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    work = Work(given.out, given.scratch, given.dry_run)
    try:
        work.say(importlib.import_module(f"gpu_steps.{given.step}").run(work), "finished")
    except Skipped as error:
        work.say(str(error), "skipped")
    except Incomplete as error:
        work.say(str(error), "failed")
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        work.say(sentence(error), "failed")
        sys.exit(1)


if __name__ == "__main__":
    main()
