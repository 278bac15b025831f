"""The commands of ``python -m llava_integration``, each with its options as parameters.

What a command alone needs is imported when it runs.
"""

from __future__ import annotations

from llava_integration.demo.config import LlavaDemoConfig
from llava_integration.evaluate.lmms.commands import evaluate, tasks
from llava_integration.evaluate.sweep import sweep
from llava_integration.hosts.doctor import doctor
from llava_integration.train.training import train
from vst.results.stopping import goes_on


@goes_on
def demo(
    out: str = "runs/llava-demo",
    demo: LlavaDemoConfig = LlavaDemoConfig(),  # noqa: B008 (frozen)
    overwrite: bool = False,
) -> None:
    """The whole job offline: a small language model learns to talk about pictures that it sees through a stitch tree.

    Args:
        out: run folder, where the model is left; a second call finds what is there.
        demo: what to run.
        overwrite: start again; a run that is there is gone on with otherwise.
    """
    from llava_integration.demo.job import run_demo

    run_demo(out, demo, resume=not overwrite, overwrite=overwrite)


def answer(
    model: str, image: str, question: str, split: int | dict[str, int] | None = None, max_new_tokens: int = 64
) -> None:
    """Answer a question about a picture.

    Examples:
        python -m llava_integration answer --model runs/llava-demo --image picture.png --question "What is at the left?"

    Args:
        model: folder of a trained model.
        image: a picture's file.
        question: in words.
        split: trunk depth to see it at, or one by branch; default: the model's own.
        max_new_tokens: longest answer.
    """
    from pathlib import Path

    from llava_integration.answer.ask import Question, ask
    from llava_integration.models.assemble import load

    whole, processor = load(model)
    if split is not None:
        whole.model.vision_tower.split = split
    asked = [Question(Path(image), question, "", "")]
    print(ask(whole, processor, asked, max_new_tokens=max_new_tokens, show=False)[0])


COMMANDS = (train, answer, evaluate, tasks, sweep, demo, doctor)
