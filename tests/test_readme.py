"""What README and docs show is so: their Python runs, their commands parse, their links and files are there."""

import re
import runpy
import shlex
import sys

import pytest
import torch
import yaml
from pages_kit import FENCE, PAGES, README, ROOT

import llava_integration
import vst
from llava_integration.commands import COMMANDS
from llava_integration.evaluate.lmms.record import NAME
from llava_integration.hosts.hooks import hooked
from llava_integration.models.assemble import assemble, load
from vst import VSTEncoder, cli
from vst.bundle.unbundle import options
from vst.fit.objectives import OBJECTIVES, fitting_objectives
from vst.parsing import parse
from vst.protocol.tasks import TASKS
from vst.tree.fusion import FUSIONS
from vst.tree.stitches import STITCHES

SCRIPTS = {
    "train/stitch.py": (cli.COMMANDS, "fit"),
    "train/mllm.py": (COMMANDS, "train"),
    "eval/latency.py": (cli.COMMANDS, "latency"),
    "eval/sweep.py": (cli.COMMANDS, "protocol"),
    "eval/lmms.py": (COMMANDS, "evaluate"),
}
PROGRAMS = ("vst ", "python ", "torchrun ", "deepspeed ", "make ", "pip ")


def blocks(page, language):
    return [text for kind, text in FENCE.findall(PAGES[page]) if kind == language]


def shell_lines(page):
    """Commands of the shell blocks that belong to this project, continued lines as one."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    ours = (*SCRIPTS, "vst ", "-m llava_integration", "-m lmms_eval", "make ", "pip ")
    return [line for line in lines if any(part in line.split("#")[0] for part in ours)]


def inline_commands(page):
    """Commands between backticks in running text, once each."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", PAGES[page]))]
    return list(dict.fromkeys(span for span in spans if span.startswith(PROGRAMS)))


LINES = [(page, line) for page in PAGES for line in shell_lines(page)]
INLINE = [(page, line) for page in PAGES for line in inline_commands(page)]


def test_a_few_lines_of_python(tiny, picture_folder, tmp_path, monkeypatch, pictures):
    small = {'"dinov2-l"': repr(tiny("dinov2", depth=24)), '"clip-l-336"': repr(tiny("clip", 48, depth=24))}
    space = run_python("README.md", {**small, "image_size=336": "image_size=56"}, tmp_path, monkeypatch, pictures)
    assert space["tokens"].shape == (1, 16, 80)
    assert VSTEncoder.from_pretrained(tmp_path / "my-tree").splits == [6, 14, 22]


def test_the_python_face(tiny, picture_folder, tmp_path, monkeypatch, pictures):
    small = {
        "timm:vit_large_patch14_dinov2.lvd142m": tiny("dinov2", depth=24),
        "timm:vit_large_patch14_clip_quickgelu_336.openai": tiny("clip", 48, depth=24),
        "image_size=336": "image_size=56",
    }
    space = run_python("docs/library.md", small, tmp_path, monkeypatch, pictures)
    assert space["tokens"].shape == (1, 16, 80)
    assert space["maps"]["clip"].map.shape == (1, 48, 4, 4)
    assert space["tree"].splits == [14]


def test_a_tuned_tree(tiny, picture_folder, tmp_path, monkeypatch, pictures):
    small = {'"dinov2-l"': repr(tiny("dinov2", depth=24)), '"clip-l-336"': repr(tiny("clip", 48, depth=24))}
    space = run_python("docs/recipe.md", {**small, "image_size=336": "image_size=56"}, tmp_path, monkeypatch, pictures)
    tree, pixels = space["tree"], torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for made in (space["again"], VSTEncoder.from_pretrained(tmp_path / "tuned-tree")):
        assert all(torch.equal(value, made.state_dict()[name]) for name, value in tree.state_dict().items())
        torch.testing.assert_close(made(pixels, split=22), tree(pixels, split=22), rtol=1e-5, atol=1e-5)
    trunk, own = VSTEncoder.from_pretrained(tmp_path / "tuned-trunk"), tree.features(pixels)["clip"].tokens
    assert (trunk.config.names, trunk.config.tuned.tails) == (["clip"], "none")
    torch.testing.assert_close(trunk.eval().features(pixels)["clip"].tokens, own, rtol=1e-5, atol=1e-5)
    published = VSTEncoder.from_vfms(tiny("clip", 48, depth=24), [], [], 56)
    assert not torch.allclose(published.eval().features(pixels)["clip"].tokens, own, atol=1e-3)


def test_the_language_model(tree_of, lm, pictures, tmp_path, monkeypatch):
    tree = tree_of(splits=(1, 3))
    for part in assemble(tree, *lm()):
        part.save_pretrained(tmp_path / "runs" / "llava-demo")
    small = {"vision_tower.split = 10": "vision_tower.split = 1"}
    space = run_python("docs/multimodal.md", small, tmp_path, monkeypatch, pictures)
    assert space["answer"].shape[0] == 1
    model, processor = space["model"], space["processor"]
    assert model.model.vision_tower.split == 1
    model.model.vision_tower.split = 3  # as it was when the page asked
    assert len(set(map(len, space["texts"]))) == 2
    for text, answer in zip(space["texts"], space["answers"], strict=True):
        one = processor(images=pictures[0], text=text, return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=20)[0, one["input_ids"].shape[1] :]
        assert answer[: len(alone)].tolist() == alone.tolist()


def test_a_language_model_is_cut_to_a_split(tree_of, lm, pictures, tmp_path, monkeypatch, capsys):
    """It answers as the whole one at that split, from fewer weights; inspect and latency take its folder."""
    model, processor = assemble(tree_of(splits=(1, 2, 3)), *lm())
    for part in (model, processor):
        part.save_pretrained(tmp_path / "runs" / "finetune")
    small = {"pruned([10])": "pruned([2])", "runs/finetune-10": "runs/finetune-2"}
    run_python("docs/commands.md", small, tmp_path, monkeypatch, pictures)
    cut, again = load(tmp_path / "runs" / "finetune-2")
    assert cut.model.vision_tower.tree.splits == [2]
    content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    text = again.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = again(images=[pictures[0]], text=[text], return_tensors="pt")
    whole, _ = load(tmp_path / "runs" / "finetune")
    whole.model.vision_tower.split = 2
    with torch.inference_mode():
        torch.testing.assert_close(cut(**batch).logits, whole(**batch).logits, rtol=1e-5, atol=1e-6)
        whole.model.vision_tower.split = 3
        assert not torch.allclose(cut(**batch).logits, whole(**batch).logits, atol=1e-4)
    sizes = [(tmp_path / "runs" / name / "model.safetensors").stat().st_size for name in ("finetune-2", "finetune")]
    assert sizes[0] < sizes[1]
    cli.main(["inspect", "runs/finetune"])
    assert "VST-3 (default)" in capsys.readouterr().out
    cli.main(["latency", "--path", "runs/finetune-2", "--device", "cpu", "--repeats", "1"])
    assert "VST-2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a language model on a tree, where a tree alone is expected"):
        VSTEncoder.from_pretrained("runs/finetune")


def test_the_hook_of_hosts(tmp_path, monkeypatch, pictures):
    builder = tmp_path / "cambrian" / "model" / "multimodal_encoder" / "builder.py"
    builder.parent.mkdir(parents=True)
    builder.write_text("def build_vision_tower(vision_tower_cfg, **kwargs):\n    return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        run_python("docs/hosts.md", {}, tmp_path, monkeypatch, pictures)
        assert hooked("cambrian") == ["cambrian.model.multimodal_encoder.builder"]
    finally:
        llava_integration.uninstall()
        for name in [n for n in sys.modules if n.partition(".")[0] == "cambrian"]:
            del sys.modules[name]


def run_python(page, replaced, folder, monkeypatch, pictures):
    """Run a page's only block of Python in a folder, with small things in place of large ones; what it left."""
    (code,) = blocks(page, "python")
    for real, small in replaced.items():
        assert real in code
        code = code.replace(real, small)
    monkeypatch.chdir(folder)
    space = {"image": pictures[0]}
    exec(code, space)
    return space


def test_all_python_is_run():
    shown = {page for page in PAGES if blocks(page, "python")}
    assert shown == {"README.md", *(f"docs/{n}.md" for n in ("library", "multimodal", "hosts", "commands", "recipe"))}


@pytest.mark.parametrize(("page", "line"), LINES)
def test_command_lines_parse(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    assert check_command(words) or words[-1] == "..."


@pytest.mark.parametrize(("page", "line"), INLINE)
def test_commands_in_running_text_parse(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(shlex.split(line))


def check_command(words):
    """Whether a command was parsed in full; one without options, or that ends in ..., is only looked up."""
    if script := next((word for word in words if word.endswith(".py")), None):
        rest = words[words.index(script) + 1 :]
        assert (ROOT / script).is_file()
        if script not in SCRIPTS or rest[:1] in ([], ["..."]):
            return False
        commands, name = SCRIPTS[script]
        if script == "eval/lmms.py" and runpy.run_path(script)["has_rows"](rest):
            name = "sweep"
        return bool(parse(commands, [name, *rest]))
    if words[0] == "make":
        assert f"{words[1]}:" in (ROOT / "Makefile").read_text()
        return True
    if words[0] == "pip":
        extras = re.findall(r"\.\[([\w,-]+)\]", " ".join(words))
        for extra in ",".join(extras).split(",") if extras else ():
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        return True
    if "llava_integration" in words:
        first, *rest = words[words.index("llava_integration") + 1 :] or ["MODULE"]
        if "." in first or first == "MODULE":  # a host's module: its options
            assert first.startswith(("llava.train.", "llava.serve.", "lmms_eval.", "MODULE"))
            return True
        return look_up(COMMANDS, first, rest)
    if "lmms_eval" in words:
        assert words[words.index("--model") + 1] == NAME
        return True
    if words[:3] == ["python", "-m", "MODULE"]:
        return False
    if words[1:3] == ["-m", "vst.bundle"] or words[1].endswith("vst/bundle"):
        return bool(options().parse_args(words[3 if words[1] == "-m" else 2 :]))
    at = words.index("vst")
    assert words[:at] in ([], ["torchrun", "--nproc_per_node", "2", "-m"])
    return look_up(cli.COMMANDS, words[at + 1], words[at + 2 :])


def look_up(commands, name, rest):
    assert name in [command.__name__ for command in commands]
    needed = name in ("demo", "doctor", "tasks")  # may stand alone
    if rest[-1:] == ["..."] or not (rest or needed):
        return False
    return bool(parse(commands, [name, *rest]))


def test_every_command_is_told_of():
    page = PAGES["docs/commands.md"]
    for program, commands in (("vst", cli.COMMANDS), ("python -m llava_integration", COMMANDS)):
        for command in commands:
            assert f"| `{program} {command.__name__}` |" in page
    assert all(f"`{script}`" in page for script in SCRIPTS)


def test_all_that_is_registered_is_told_of():
    rows = {page: re.findall(r"^\| (.+?) \|", PAGES[page], re.M) for page in PAGES}
    for page, names in {
        "docs/models.md": (*STITCHES, *FUSIONS),
        "docs/protocol.md": (*OBJECTIVES, *TASKS),
        "docs/library.md": vst.__all__,
    }.items():
        assert set(names) <= set(re.findall(r"`(\w[\w-]*)`", " ".join(rows[page])))
    assert set(fitting_objectives()) <= set(re.findall(r"`(?:objective: )?(\w+)`", PAGES["docs/models.md"]))


def test_there_are_commands_to_test():
    assert len(LINES) >= 40
    assert len(INLINE) >= 40


def test_files_that_pages_name_exist():
    rooms = "configs|docs|train|eval|tests|tools|vst|llava_integration"
    named = re.compile(rf"(?<![\w/.-])(?:{rooms})/[\w./*-]+\.(?:yaml|py|json|md|png)")
    found = {(page, path) for page, text in PAGES.items() for path in named.findall(text) if "NAME" not in path}
    assert len(found) >= 60
    for page, path in found:
        assert any(ROOT.glob(path)), (page, path)


def headings(text):
    """Anchors of a page's headings as GitHub makes them, those that are said twice numbered."""
    found = []
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M):
        plain = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        seen = sum(re.fullmatch(rf"{re.escape(plain)}(-\d+)?", other) is not None for other in found)
        found.append(f"{plain}-{seen}" if seen else plain)
    return found


def links(page):
    """Links and pictures of a page's running text."""
    text = re.sub(r"`[^`]*`", "", FENCE.sub("", PAGES[page]))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("https://", "http://"))]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in headings(PAGES[str(target.relative_to(ROOT))]), link


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(README.splitlines()) <= 170
    pages = {page for page in PAGES if page.count("/") < 2 and page != "README.md"}
    assert pages <= set(links("README.md"))


def test_the_citation_is_complete():
    text = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(text)  # what the format requires
    assert (text["cff-version"], text["type"]) == ("1.2.0", "software")
    assert text["version"] == vst.__version__
    assert f'license = "{text["license"]}"' in (ROOT / "pyproject.toml").read_text()
    assert all(isinstance(author["name"], str) for author in text["authors"])
    (paper,) = text["references"]
    assert {"type", "title", "authors"} <= set(paper)  # of a reference
    assert f"*{paper['title']}*" in README
    assert f"{paper['conference']['name']}" == f"CVPR {paper['year']}"
    assert paper["url"] in README
