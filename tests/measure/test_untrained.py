"""What a config tells alone: trees are timed and described although none of their sources can be reached."""

from dataclasses import replace

import pytest
import torch

from vst import VSTEncoder, cli, load_vfm
from vst.measure.latency import measure_tree
from vst.measure.throughput import measure_fit
from vst.results.folders import read_json, write_json
from vst.tree.baseline import FullEncoders, FullTower

GONE = {"dinov2": "hf:nobody/no-trunk", "clip": "open_clip:no-architecture/no-tag"}


@pytest.fixture(params=["save_pretrained", "save_stitches"])
def out_of_reach(request, tree_of, tmp_path):
    """Folder of a tree, whole or its stitches alone, whose sources are on no hub."""
    tree = tree_of("dinov2", "clip", splits=(1, 2, 3))
    folder = getattr(tree, request.param)(tmp_path / "tree")
    values = read_json(folder / "config.json")
    values["trunk"]["source"] = GONE["dinov2"]
    values["branches"][0]["spec"]["source"] = GONE["clip"]
    write_json(folder / "config.json", values)
    return tree, folder


def test_timing_reaches_for_no_source(out_of_reach, tmp_path, capsys):
    tree, folder = out_of_reach
    cli.main(["inspect", str(folder)])
    assert "VST-2" in capsys.readouterr().out
    cli.main(["latency", "--path", str(folder), "--repeats", "1", "--out", str(tmp_path / "latency")])
    rows = read_json(tmp_path / "latency" / "results.json")["results"]
    assert [r["name"] for r in rows] == ["all in full", "dinov2 alone", "clip alone", "VST-1", "VST-2", "VST-3"]
    own = measure_tree(tree, repeats=1, show_progress=False)
    assert [(r["gflops"], r["peak_mb"]) for r in rows] == [(r["gflops"], r["peak_mb"]) for r in own]
    options = ["--batch_size", "2", "--repeats", "1", "--out", str(tmp_path / "fit")]
    cli.main(["throughput", "--path", str(folder), *options])
    steps = read_json(tmp_path / "fit" / "results.json")["results"]
    own = measure_fit(tree, batch_size=2, repeats=1, show_progress=False)
    for key in ("name", "gflops", "saved_mb"):
        assert [r[key] for r in steps["rows"]] == [r[key] for r in own["rows"]]


def test_an_untrained_tree_is_the_tree_but_for_its_numbers(tree_of):
    tree = tree_of("dinov3", "clip", "siglip", splits=[1, 3])
    config = replace(tree.config, trunk=replace(tree.config.trunk, source=GONE["dinov2"]))
    other = VSTEncoder.from_config(config, pretrained=False)
    assert other.config == config
    shapes = [{n: (t.shape, t.dtype) for n, t in t.state_dict().items()} for t in (tree, other)]
    assert shapes[0] == shapes[1]
    assert {n for n, p in tree.named_parameters() if p.requires_grad} == {
        n for n, p in other.named_parameters() if p.requires_grad
    }
    assert torch.isfinite(other(torch.randn(1, 3, 64, 64))).all()


def test_models_in_full_at_random_come_from_the_specs(tree_of, tiny):
    config = tree_of("dinov2", "clip").config
    sources = {n: spec.source for n, spec in config.specs.items()}
    gone = replace(
        config,
        trunk=replace(config.trunk, source=GONE["dinov2"]),
        branches=tuple(replace(b, spec=replace(b.spec, source=GONE["clip"])) for b in config.branches),
    )
    for made in (FullEncoders.load(gone, pretrained=False), FullTower.from_config(gone, pretrained=False)):
        for name, source in sources.items():
            want = load_vfm(source, grid=4, pretrained=False, stop=3, norm=False).state_dict()
            got = made.models[name].state_dict()
            assert got.keys() == want.keys()
            assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_known_spec_is_not_described_again(tiny, monkeypatch):
    from vst.models import checkpoints

    source = tiny("clip")
    spec, want = checkpoints.describe(source), load_vfm(source, grid=3)
    monkeypatch.setattr(checkpoints, "describe", lambda source: pytest.fail(f"{source} was described"))
    got = load_vfm(spec, grid=3)
    assert got.spec == spec
    assert all(torch.equal(t, got.state_dict()[n]) for n, t in want.state_dict().items())


def test_inspecting_a_tree_of_the_hub_fetches_its_config_alone(tree_of, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    tree, fetched = tree_of("dinov2", "clip"), []
    folder = tree.save_pretrained(tmp_path / "tree")

    def snapshot(repo_id, *, revision, allow_patterns):
        fetched.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    cli.main(["inspect", "someone/tree"])
    cli.main(["latency", "--path", "someone/tree", "--repeats", "1"])
    assert fetched == [["config.json"], ["config.json"]]
    assert "VST-3" in capsys.readouterr().out
    type(tree).from_pretrained("someone/tree")
    assert "model.safetensors" in fetched[-1]
