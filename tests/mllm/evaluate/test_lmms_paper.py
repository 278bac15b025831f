"""The paper's tasks, as lmms-eval defines them, on a few rows of their shape in place of their data."""

from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")
pytest.importorskip("datasets")

import lmms_eval.tasks
from datasets import Dataset, DatasetDict
from lmms_kit import folder  # noqa: F401 (fixture)

from llava_integration.evaluate.lmms import SUITES, TASKS, evaluate
from llava_integration.evaluate.lmms.suites import manager

OWN = Path(lmms_eval.tasks.__file__).parent
ANSWERS = [{"answer": "yes", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
SHAPES = {
    "vqav2_val": {
        "question_type": "is", "answer_type": "yes/no", "multiple_choice_answer": "yes", "answers": ANSWERS,
        "question_id": 1, "question": "Is it red?", "answer": "yes",
    },
    "mme": {"question_id": "OCR/1.png", "question": "Is it red? Please answer yes or no.", "answer": "Yes",
            "category": "OCR"},
    "gqa": {"id": "1", "imageId": "1", "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes, it is."},
    "textvqa_val": {"question_id": 1, "question": "what is written?", "answers": ["yes"] * 10, "ocr_tokens": ["yes"]},
    "pope": {"question_id": "1", "question": "Is there a dog?", "answer": "yes", "category": "random"},
    "mmvp": {"Index": 1, "Question": "Is it red?", "Options": "(a) Yes (b) No", "Correct Answer": "(a)"},
}  # fmt: skip
SHAPES["vst_textvqa_val_ocr"] = SHAPES["textvqa_val"]


@pytest.mark.slow  # reads lmms-eval's index of tasks
def test_hints_are_the_difference_between_the_two_of_text_vqa():
    index = manager(SUITES["paper"])
    assert set(SUITES["paper"]) == set(SHAPES)
    assert all(index.match_tasks([task]) for task in SUITES["paper"])
    doc = {"question": "what is written?", "ocr_tokens": ["STOP", "HERE"]}
    configs = {task: index._get_config(task) for task in ("textvqa_val", "vst_textvqa_val_ocr")}
    for task, config in configs.items():
        text = config["doc_to_text"](doc, config["lmms_eval_specific_kwargs"]["default"])
        assert ("STOP, HERE" in text) == task.endswith("_ocr")
    same = ("dataset_path", "test_split", "generation_kwargs", "output_type")
    assert len({str([config[key] for key in same]) for config in configs.values()}) == 1


@pytest.mark.parametrize("task", SUITES["paper"])
def test_a_task_runs_and_has_a_score(folder, task, pictures, tmp_path):  # noqa: F811
    file = next(iter((*OWN.rglob(f"{task}.yaml"), *TASKS.glob(f"{task}.yaml"))))
    split = next(
        line.split()[1]
        for name in (file, *file.parent.glob("_default_template*"))
        for line in name.read_text().splitlines()
        if line.startswith("test_split:")
    )
    rows = Dataset.from_list([{**SHAPES[task], "image": image} for image in pictures[:2]])
    DatasetDict({split: rows}).save_to_disk(tmp_path / "data")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "toy.yaml").write_text(
        f"include: {file}\ntask: toy\ndataset_path: {tmp_path / 'data'}\ndataset_kwargs: {{load_from_disk: true}}\n"
        + ("doc_to_visual: image\nprocess_docs: null\n" if task == "gqa" else "")  # its pictures are another dataset
    )
    options = {"include": str(tmp_path / "tasks"), "output": tmp_path / "out", "show": False, "batch_size": 2}
    found = evaluate(str(folder), ["toy"], gen_kwargs="max_new_tokens=4", **options)
    assert found["tasks"]["toy"]["n"] == 2
    prompt = found["model"]["prompts"]["toy"]
    assert prompt.startswith("<|im_start|>user\n<image>\n")
    assert SHAPES[task].get("question", SHAPES[task].get("Question"))[1:8] in prompt
