"""Local tasks under lmms-eval: their data, their scores, and that nothing that failed looks like a success."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("lmms_eval")
pytest.importorskip("datasets")

from datasets import load_from_disk
from lmms_kit import EASY_VQA, Answering, folder, questions, roots  # noqa: F401 (fixtures)

import llava_integration.commands as commands
from llava_integration.answer import scenes
from llava_integration.evaluate.lmms import DATASETS, TASKS, EvaluationFailed, evaluate, write
from llava_integration.models.assemble import load
from llava_integration.train.config import TuneConfig
from llava_integration.train.data import DataConfig
from llava_integration.train.training import train
from vst.parsing import run

pytest_plugins = ("training_kit",)
ROOT = Path(__file__).parents[3]


def rows(questions, task):  # noqa: F811
    return list(load_from_disk(str(questions / task))["test"])


def scores(model, questions, tasks=tuple(DATASETS), **options):  # noqa: F811
    return evaluate(model, tasks, data=questions, **options)


class TestData:
    def test_easy_vqa_is_whole(self, questions):  # noqa: F811
        found = rows(questions, "vst_easy_vqa")
        assert sorted((r["question"], r["answer"], int(r["picture"])) for r in found) == sorted(map(tuple, EASY_VQA))
        for row in found:
            assert row["image"].convert("RGB").getpixel((0, 0)) == (90 * int(row["picture"]), 0, 200)

    def test_scenes_are_those_of_the_demo(self, questions, roots, tmp_path):  # noqa: F811
        expected = scenes.questions(tmp_path, roots["vst_scenes"], 8, "fluent", 1000)
        found = rows(questions, "vst_scenes")
        assert [(r["question"], r["answer"], r["kind"], r["picture"]) for r in found] == [
            (q.question, q.answer, q.kind, q.image.stem) for q in expected
        ]
        for row, q in zip(found, expected, strict=True):
            assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(q.image)))

    def test_what_is_there_stays(self, roots, tmp_path):  # noqa: F811
        def stamps():
            return {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}

        write(tmp_path, 3, ["vst_labels"], **roots)
        first = stamps()
        assert {p.relative_to(tmp_path).parts[0] for p in first} == {"vst_labels"}
        write(tmp_path, 3, ["vst_labels"], **roots)
        assert stamps() == first
        with pytest.raises(FileExistsError, match="holds 3 questions, not 4"):
            write(tmp_path, 4, ["vst_labels"], **roots)
        assert stamps() == first
        write(tmp_path, 4, ["vst_labels"], overwrite=True, **roots)
        assert len(rows(tmp_path, "vst_labels")) == 4
        assert [p.name for p in tmp_path.iterdir()] == ["vst_labels"]

    def test_other_things_are_left_alone(self, roots, tmp_path):  # noqa: F811
        (tmp_path / "vst_labels").mkdir()
        (tmp_path / "vst_labels" / "thesis.txt").write_text("mine")
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="holds something else"):
                write(tmp_path, 3, ["vst_labels"], overwrite=overwrite, **roots)
        assert (tmp_path / "vst_labels" / "thesis.txt").read_text() == "mine"

    def test_missing_questions_are_written_on_the_way(self, roots, tmp_path, monkeypatch):  # noqa: F811
        from llava_integration.evaluate.lmms import questions as module

        sources = {name: module.Source(s.draw, lambda name=name: roots[name]) for name, s in DATASETS.items()}
        for name, source in sources.items():
            monkeypatch.setitem(module.DATASETS, name, source)
        monkeypatch.setattr(module.write, "__defaults__", (None, 2, tuple(DATASETS), False))
        monkeypatch.delenv("VST_TASKS", raising=False)
        found = scores(Answering(lambda doc: doc["answer"]), tmp_path / "data", ["vst_labels"])
        assert found["tasks"]["vst_labels"]["n"] == 2
        assert [p.name for p in (tmp_path / "data").iterdir()] == ["vst_labels"]
        assert "VST_TASKS" not in os.environ

    def test_who_misses_them_is_told(self, tmp_path, monkeypatch):
        from llava_integration.evaluate.lmms.questions import find

        monkeypatch.setenv("VST_TASKS", str(tmp_path))
        with pytest.raises(FileNotFoundError, match="python -m llava_integration tasks"):
            find("vst_labels")

    def test_errors(self, roots, tmp_path):  # noqa: F811
        with pytest.raises(ValueError, match="no questions for nope; expected vst_easy_vqa"):
            write(tmp_path, 3, ["nope"])
        with pytest.raises(ValueError, match="count is 0"):
            write(tmp_path, 0, **roots)
        with pytest.raises(ValueError, match="there are 8"):
            write(tmp_path, 9, ["vst_easy_vqa"], **roots)
        assert not list(tmp_path.iterdir())

    def test_task_files_are_package_data(self):
        shipped = {path.name for path in TASKS.iterdir() if not path.name.endswith(".py")} - {"__pycache__"}
        assert shipped == {f"{t}.yaml" for t in (*DATASETS, "vst_textvqa_val_ocr")} | {"_questions_yaml"}
        patterns = ("*.yaml", "*_yaml")
        assert (
            f'"llava_integration.evaluate.tasks" = {json.dumps(list(patterns))}'
            in (ROOT / "pyproject.toml").read_text()
        )
        assert all(any(Path(name).match(p) for p in patterns) for name in shipped)


class TestScores:
    @pytest.mark.parametrize("answer", ["yes", "no", "cat", "two", "top left", "nothing of all this"])
    def test_a_constant_answer_scores_its_frequency(self, questions, answer):  # noqa: F811
        found = scores(Answering(lambda doc: f"The {answer.upper()}.\n"), questions)
        for task in DATASETS:
            docs = rows(questions, task)
            expected = Counter(doc["answer"] for doc in docs)[answer] / len(docs)
            assert found["tasks"][task]["score"] == pytest.approx(expected)
            for kind, own in found["tasks"][task]["kinds"].items():
                of = [doc["answer"] for doc in docs if doc["kind"] == kind]
                assert own["n"] == len(of)
                assert own["accuracy"] == pytest.approx(of.count(answer) / len(of))
                assert own["majority"] == pytest.approx(Counter(of).most_common(1)[0][1] / len(of))

    def test_an_oracle_scores_one(self, questions):  # noqa: F811
        found = scores(Answering(lambda doc: f" The {doc['answer'].title()}.\nAnd more."), questions)
        assert list(found["tasks"]) == list(DATASETS)
        for task in DATASETS:
            assert found["tasks"][task]["score"] == 1
            assert found["tasks"][task]["metric"] == "exact_match"
            assert set(found["tasks"][task]["metrics"].values()) == {1.0}
            assert found["tasks"][task]["n"] == len(found["samples"][task]) == 8

    def test_every_kind_has_a_metric(self, questions):  # noqa: F811
        """One that the task file does not name would be lost without a word."""
        found = scores(Answering(lambda doc: doc["answer"]), questions)
        for task in DATASETS:
            kinds = {doc["kind"] for doc in rows(questions, task)}
            assert len(found["tasks"][task]["metrics"]) == 1 + len(kinds)
            named = yaml.safe_load((TASKS / f"{task}.yaml").read_text().replace("!function ", ""))["metric_list"]
            assert {entry["metric"] for entry in named} == set(found["tasks"][task]["metrics"])

    def test_samples_hold_what_intervals_need(self, questions):  # noqa: F811
        found = scores(Answering(lambda doc: "yes"), questions, ["vst_easy_vqa"])
        for sample, doc in zip(found["samples"]["vst_easy_vqa"], rows(questions, "vst_easy_vqa"), strict=True):
            assert sample["answer"] == "yes"
            assert {k: sample[k] for k in ("question", "kind", "picture")} == {
                k: doc[k] for k in ("question", "kind", "picture")
            }
            assert sample["target"] == doc["answer"]
            assert sample["exact_match"] == (doc["answer"] == "yes")

    def test_limit_takes_the_first(self, questions):  # noqa: F811
        found = scores(Answering(lambda doc: doc["answer"]), questions, ["vst_scenes"], limit=3)
        assert [s["id"] for s in found["samples"]["vst_scenes"]] == [0, 1, 2]
        assert found["tasks"]["vst_scenes"]["n"] == 3

    def test_a_tag_names_all(self, questions):  # noqa: F811
        found = scores(Answering(lambda doc: doc["answer"]), questions, ["vst_local"])
        assert set(found["tasks"]) == set(DATASETS)

    def test_a_model_on_a_tree(self, folder, questions):  # noqa: F811
        """The picture counts: two pictures under one question are answered alike only when they are blanked."""
        seen = scores(str(folder), questions, ["vst_labels"], split=1, show=False)
        blind = scores(str(folder), questions, ["vst_labels"], split=1, show=False, blank=True)
        answers = [{s["answer"] for s in found["samples"]["vst_labels"]} for found in (seen, blind)]
        assert len(answers[0]) > 1
        assert len(answers[1]) == 1
        assert seen["model"]["split"] == 1
        assert blind["model"]["blank"] is True
        assert seen["model"]["seed"] == seen["settings"]["config"]["torch_seed"] == 0
        assert "What does the label say?" in seen["model"]["prompts"]["vst_labels"]
        json.dumps(seen)

    @pytest.mark.slow
    def test_blanked_pictures_lower_the_score_of_a_model_that_was_trained(self, kit, questions, roots, tmp_path):  # noqa: F811
        """Two of the questions are asked about both pictures and answered otherwise."""
        records = [
            {"id": str(i), "image": f"{picture}.png", "conversations": [
                {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]}
            for i, (question, answer, picture) in enumerate(EASY_VQA)
        ]  # fmt: skip
        (tmp_path / "data.json").write_text(json.dumps(records))
        data = DataConfig([str(tmp_path / "data.json")], str(roots["vst_easy_vqa"] / "test" / "images"), max_length=256)
        options = kit.options(150, rate=1e-2, num_train_epochs=200)
        train(kit.model, data, str(tmp_path / "trained"), TuneConfig(llm="full"), **options)
        seen, blind = (
            scores(str(tmp_path / "trained"), questions, ["vst_easy_vqa"], show=False, blank=blank)["tasks"]
            for blank in (False, True)
        )
        assert seen["vst_easy_vqa"]["score"] == 1
        assert blind["vst_easy_vqa"]["score"] <= 7 / 8

    def test_choosing_among_answers(self, folder, questions, tmp_path):  # noqa: F811
        """A task of lmms-eval's type multiple_choice: the answer that is likeliest in a forward pass of its own."""
        (tmp_path / "among.py").write_text("def choices(doc):\n    return ['cat', 'star', 'a key here', 'ball']\n")
        (tmp_path / "among.yaml").write_text(
            f"task: among\ndataset_path: {questions / 'vst_labels'}\ndataset_kwargs: {{load_from_disk: true}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_visual: image\ndoc_to_text: question\n"
            "doc_to_target: answer\ndoc_to_choice: !function among.choices\n"
            "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        )
        found = evaluate(str(folder), ["among"], include=str(tmp_path), show=False, batch_size=3)
        model, processor = load(folder)
        for sample, doc in zip(found["samples"]["among"], rows(questions, "vst_labels"), strict=True):
            start = "<|im_start|>user\n<image>\nWhat does the label say?<|im_end|>\n<|im_start|>assistant\n"
            losses = []
            for choice in ("cat", "star", "a key here", "ball"):
                inputs = processor(text=f"{start}{choice}<|im_end|>", images=doc["image"], return_tensors="pt")
                labels = inputs["input_ids"].clone()
                labels[:, : len(processor(text=start, images=doc["image"])["input_ids"][0])] = -100
                with torch.no_grad():
                    losses.append(model(**inputs, labels=labels).loss.item())
            assert [loss for loss, _ in sample["answer"]] == pytest.approx(losses, abs=1e-4)

    def test_generation_options_win_over_the_tasks(self, folder, questions):  # noqa: F811
        short = scores(str(folder), questions, ["vst_labels"], gen_kwargs="max_new_tokens=1", show=False)
        long = scores(str(folder), questions, ["vst_labels"], show=False)
        pairs = zip(short["samples"]["vst_labels"], long["samples"]["vst_labels"], strict=True)
        assert any(len(a["answer"]) < len(b["answer"]) for a, b in pairs)
        assert short["settings"]["generation_kwargs"]["vst_labels"]["max_new_tokens"] == 1


class TestFailures:
    def test_the_cause_is_named(self, questions):  # noqa: F811
        def fail(doc):
            raise KeyError("out of ink")

        with pytest.raises(EvaluationFailed, match="lmms-eval failed on vst_labels: KeyError: 'out of ink'"):
            scores(Answering(fail), questions, ["vst_labels"])

    def test_too_few_answers(self, questions):  # noqa: F811
        class Lazy(Answering):
            def generate_until(self, requests):
                return super().generate_until(requests)[:-1]

        with pytest.raises(EvaluationFailed, match="answers to 7 of 8 questions"):
            scores(Lazy(lambda doc: doc["answer"]), questions, ["vst_labels"])

    def test_no_score(self, questions, tmp_path):  # noqa: F811
        for name, aggregation in (("none", "nothing"), ("nan", "nan")):
            (tmp_path / f"{name}.py").write_text(
                "def nothing(items):\n    return None\ndef nan(items):\n    return float('nan')\n"
                "def found(doc, results):\n    return {'found': 1.0}\n"
            )
            (tmp_path / f"{name}.yaml").write_text(
                f"task: {name}\ndataset_path: {questions / 'vst_labels'}\ndataset_kwargs: {{load_from_disk: true}}\n"
                "test_split: test\noutput_type: generate_until\ndoc_to_visual: image\ndoc_to_text: question\n"
                f"doc_to_target: answer\nprocess_results: !function {name}.found\nmetric_list:\n"
                f"- {{metric: found, aggregation: !function {name}.{aggregation}, higher_is_better: true}}\n"
            )
            with pytest.raises(EvaluationFailed, match=f"{name} ended without a score"):
                evaluate(Answering(lambda doc: ""), [name], include=str(tmp_path))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tasks": ()}, "No task is named"),
            ({"limit": 0}, "limit is 0"),
            ({"split": 3}, "split is given, but the model is loaded already"),
        ],
    )
    def test_options_are_checked(self, questions, options, message):  # noqa: F811
        with pytest.raises(ValueError, match=message):
            scores(Answering(lambda doc: ""), questions, **options)

    def test_without_lmms_eval(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", None)
        with pytest.raises(ImportError, match=r"pip install \"vfm-stitch-tree\[lmms\]\""):
            evaluate("nowhere")

    @pytest.mark.slow  # reads lmms-eval's index of tasks
    def test_unknown_tasks(self):
        with pytest.raises(ValueError, match=r"no task 'vst_scene'; .* did you mean vst_scenes"):
            evaluate(Answering(lambda doc: ""), ["vst_scene"])


class TestCommands:
    def run(self, *args):
        run(commands.COMMANDS, [*args])

    def test_evaluate(self, folder, questions, tmp_path, capsys):  # noqa: F811
        out = tmp_path / "out"
        args = ["evaluate", "--model", str(folder), "--out", str(out), "--data", str(questions), "--limit", "4"]
        self.run(*args)
        results = json.loads((out / "results.json").read_text())
        assert set(results["results"]["tasks"]) == set(DATASETS)
        assert results["config"]["limit"] == 4
        assert {p.stem for p in (out / "samples").iterdir()} == set(DATASETS)
        assert "samples" not in results["results"]
        assert "most frequent answer" in capsys.readouterr().out
        before = (out / "results.json").stat().st_mtime_ns
        self.run(*args)
        assert "is complete" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="config differs in limit"):
            self.run(*args[:-1], "5")
        assert (out / "results.json").stat().st_mtime_ns == before
        self.run(*args[:-1], "5", "--tasks", "[vst_labels]", "--overwrite")
        results = json.loads((out / "results.json").read_text())["results"]
        assert results["tasks"]["vst_labels"]["n"] == 5
        assert [p.stem for p in (out / "samples").iterdir()] == ["vst_labels"]

    def test_a_failure_leaves_no_run(self, folder, questions, tmp_path):  # noqa: F811
        out = tmp_path / "out"
        args = ["evaluate", "--model", str(folder), "--out", str(out), "--data", str(questions)]
        with pytest.raises(SystemExit, match="holds no stitch at split 2") as stop:
            self.run(*args, "--split", "2")
        assert isinstance(stop.value.code, str)  # printed, and a status of 1
        assert not list(out.iterdir())
        self.run(*args, "--split", "1", "--limit", "1")
        assert (out / "results.json").is_file()

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--suite", "papers"], "suite is 'papers'; expected one of local, paper"),
            (["--suite", "local", "--tasks", "[a]"], "Both suite and tasks"),
        ],
    )
    def test_options_are_checked(self, tmp_path, args, message):
        with pytest.raises(SystemExit, match=message):
            self.run("evaluate", "--model", "x", "--out", str(tmp_path / "out"), *args)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["evaluate", "tasks"])
    def test_help_teaches(self, name, capsys):
        with pytest.raises(SystemExit) as stop:
            self.run(name, "--help")
        assert stop.value.code == 0
        assert f"python -m llava_integration {name}" in capsys.readouterr().out

    def test_tasks(self, questions, monkeypatch, capsys):  # noqa: F811
        self.run("tasks", "--out", str(questions), "--count", "8")
        out = capsys.readouterr().out
        assert f"VST_TASKS={questions} python -m lmms_eval --model vst_llava" in out
        assert f"--include_path {TASKS}" in out


def lmms_eval(*args, questions, cwd):  # noqa: F811
    """lmms-eval's own command line; its results, or None."""
    command = [sys.executable, "-m", "lmms_eval", *args, "--include_path", str(TASKS), "--output_path", str(cwd / "o")]
    environment = os.environ | {"VST_TASKS": str(questions), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)
    found = list((cwd / "o").rglob("*_results.json"))
    return (json.loads(found[0].read_text()) if found else None), done.stdout + done.stderr


@pytest.mark.slow
class TestOwnCommandLine:
    def test_vst_llava(self, folder, questions, tmp_path):  # noqa: F811
        results, said = lmms_eval(
            "--model", "vst_llava", "--model_args", f"pretrained={folder},split=1,device=cpu", "--tasks", "vst_local",
            "--batch_size", "4", questions=questions, cwd=tmp_path,
        )  # fmt: skip
        assert results, said
        expected = scores(str(folder), questions, split=1, show=False)
        for task in DATASETS:
            assert results["results"][task]["exact_match,none"] == expected["tasks"][task]["score"]
        record = results["config"]["resolved_cli_args"]["vst_llava"]
        assert record["prompts"] == expected["model"]["prompts"]
        assert (record["split"], record["fusion"], record["seed"], record["batch_size"]) == (1, "channel", 1234, 4)
        assert "torch" in record["versions"]

    def test_llava_hf(self, folder, questions, tmp_path):  # noqa: F811
        """lmms-eval's wrapper of transformers' class reads a saved model, and answers as ours does."""
        pytest.importorskip("decord")
        results, said = lmms_eval(
            "--model", "llava_hf", "--model_args", f"pretrained={folder},device=cpu,device_map=cpu",
            "--tasks", "vst_labels", "--batch_size", "1", "--log_samples", questions=questions, cwd=tmp_path,
        )  # fmt: skip
        assert results, said
        (samples,) = (tmp_path / "o").rglob("*_samples_vst_labels.jsonl")
        answers = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
        own = scores(str(folder), questions, ["vst_labels"], show=False)["samples"]["vst_labels"]
        assert [a[0] if isinstance(a, list) else a for a in answers] == [s["answer"] for s in own]
