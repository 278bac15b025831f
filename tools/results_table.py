"""Print the tables of a ``results.json`` as Markdown, for README and docs: of a demo, a sweep of models, or timings.

python tools/results_table.py docs/results/demo/results.json
python tools/results_table.py docs/results/llava-sweep/results.json
python tools/results_table.py docs/results/performance/latency-demo.json
"""

import argparse

from vst.demo.tables import demo_markdown
from vst.measure.tables import timings_markdown
from vst.results.folders import read_json
from vst.results.tables import markdown


def main() -> None:
    """Print the tables and the caption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", help="results.json of a run of vst demo, latency, runtimes or throughput, or of eval/lmms.py"
    )
    results = read_json(parser.parse_args().results)["results"]
    if isinstance(results, list) or "runtimes" in results or {"rows", "batch_size"} <= set(results):
        print(timings_markdown(results))
        return
    if "one" in results:
        from llava_integration.evaluate.sweep import sweep_rows

        print(markdown(*sweep_rows(results)), results["caption"], sep="\n\n")
        return
    print(demo_markdown(results))


if __name__ == "__main__":
    main()
