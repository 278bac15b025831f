"""What a checkpoint brings is compared with what was saved, by whatever route, whenever the tower is filled."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llava_integration.hosts import stamp
from llava_integration.hosts.tower import VSTVisionTower

ARGS = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
PREFIX = "model.vision_tower."


@pytest.fixture
def folder(tree_of, tmp_path):
    return tree_of("dinov2", "clip").save_pretrained(tmp_path / "tree")


class Host(nn.Module):
    """A model with the tower where LLaVA has it: left to a checkpoint, or loaded at once as LLaVA-NeXT does."""

    def __init__(self, folder, delay, suffix=""):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = VSTVisionTower(f"vst:{folder}{suffix}", ARGS, delay_load=delay)

    @property
    def tower(self):
        return self.model.vision_tower


def hooked(host, state):
    host.load_state_dict(state, strict=False)


def sharded(host, state):
    """As transformers loads a checkpoint of several files."""
    names = list(state)
    for i in range(0, len(names), 20):
        host.load_state_dict({n: state[n] for n in names[i : i + 20]}, strict=False)


def by_modules(host, state):
    """As transformers 4 loads: the parts of ``load_state_dict`` that run no hook afterwards."""

    def load(module, prefix):
        module._load_from_state_dict(state, prefix, {}, True, [], [], [])
        for name, child in module._modules.items():
            load(child, f"{prefix}{name}.")

    state = dict(state)
    load(host, "")


def behind(host, state):
    """As the loader that saves memory sets tensors; what the checkpoint lacks is rubbish, and Linears are drawn."""
    for name, old in host.state_dict().items():
        owner, _, key = name.rpartition(".")
        module = host.get_submodule(owner)
        if key in module._parameters:
            value = state[name].clone() if name in state else torch.randn_like(old) * 0.02
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
        elif name in state:
            module._buffers[key] = state[name].clone()


ROUTES = [hooked, sharded, by_modules, behind]
HOOKED = [hooked, sharded, by_modules]


@pytest.fixture
def saved(folder):
    """The state of a model whose stitches were trained since they left their folder."""
    torch.manual_seed(3)
    host = Host(folder, False)
    with torch.no_grad():
        for stitch in host.tower.vision_tower.stitches().values():
            for parameter in stitch.parameters():
                parameter.add_(torch.randn_like(parameter))
    return {n: t.clone() for n, t in host.state_dict().items()}


def stitches(state):
    return [n for n in state if ".stitches." in n]


def read(host):
    """What every host does first with a tower that it has reloaded."""
    if not host.tower.is_loaded:
        host.tower.load_model()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("delay", [True, False], ids=["left to the checkpoint", "loaded before"])
class TestRoutes:
    def sound(self, folder, delay, route, state):
        if route is behind and not delay:
            pytest.skip("that loader builds without memory, so nothing is loaded before")
        host = Host(folder, delay)
        route(host, state)
        return host

    def test_a_sound_checkpoint_is_taken_and_told(self, folder, saved, delay, route, caplog):
        caplog.set_level(logging.INFO, "llava_integration")
        host = self.sound(folder, delay, route, saved)
        read(host)
        assert all(torch.equal(t, saved[n]) for n, t in host.state_dict().items())
        tower = host.tower.vision_tower
        told = stamp.shown(stamp.checksum(stamp.stitches_of(tower), torch.float32))
        lines = [r.getMessage() for r in caplog.records if "restored by the checkpoint" in r.getMessage()]
        assert len(lines) == 1
        assert f"stitches {told} (float32)" in lines[0]
        assert "False" not in caplog.text

    def test_lacking_some(self, folder, saved, delay, route):
        state = {n: t for n, t in saved.items() if n not in stitches(saved)[:6]}
        host = self.sound(folder, delay, route, state)
        with pytest.raises(ValueError, match=r"lacks 6 of the \d+ tensors|has other stitches"):
            read(host)

    def test_one_changed(self, folder, saved, delay, route):
        for name in (stitches(saved)[2], f"{PREFIX}vision_tower.trunk.cls_token"):
            state = {**saved, name: saved[name] + 0.01}
            with pytest.raises(ValueError, match="dropped or changed"):
                read(self.sound(folder, delay, route, state))

    def test_without_its_stamp(self, folder, saved, delay, route):
        state = {n: t for n, t in saved.items() if not n.startswith(f"{PREFIX}stamp")}
        with pytest.raises(ValueError, match="without the stamp"):
            read(self.sound(folder, delay, route, state))
        zeros = {n: torch.zeros_like(t) if n.startswith(f"{PREFIX}stamp") else t for n, t in saved.items()}
        with pytest.raises(ValueError, match="without the stamp"):
            read(self.sound(folder, delay, route, zeros))

    @pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_a_tool_that_casts_every_buffer(self, folder, saved, delay, route, kind):
        buffers = [f"{PREFIX}{key}" for key in (stamp.STAMP, stamp.BYTES)]
        cast = {n: t.to(kind) if n in buffers else t for n, t in saved.items()}
        host = self.sound(folder, delay, route, cast)
        read(host)
        assert all(torch.equal(t, saved[n]) for n, t in host.state_dict().items())
        with pytest.raises(ValueError, match="dropped or changed"):
            read(self.sound(folder, delay, route, {**cast, stitches(saved)[0]: saved[stitches(saved)[0]] + 1}))

    @pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bfloat16])
    def test_checkpoints_from_before_the_bytes(self, folder, saved, delay, route, kind):
        state = {n: t for n, t in saved.items() if n != f"{PREFIX}{stamp.BYTES}"}
        state[f"{PREFIX}stamp"] = state[f"{PREFIX}stamp"].to(kind)
        host = self.sound(folder, delay, route, state)
        read(host)
        assert all(torch.equal(t, saved[n]) for n, t in host.state_dict().items())
        with pytest.raises(ValueError, match="dropped or changed"):
            read(self.sound(folder, delay, route, {**state, stitches(saved)[0]: saved[stitches(saved)[0]] + 1}))

    @pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
    def test_a_tool_that_casts_all_weights(self, folder, saved, delay, route, kind):
        cast = {n: t.to(kind) if t.is_floating_point() else t for n, t in saved.items()}
        host = self.sound(folder, delay, route, cast)
        read(host)
        assert all(torch.equal(t, cast[n].to(t.dtype)) for n, t in host.state_dict().items() if "stamp" not in n)


@pytest.mark.parametrize("route", HOOKED)
@pytest.mark.parametrize("delay", [True, False])
def test_what_was_trained_may_come_alone(folder, saved, route, delay):
    """LLaVA saves it so beside LoRA: parameters, no stamp."""
    few = {n: saved[n] for n in stitches(saved)}
    host = Host(folder, delay)
    route(host, few)
    assert host.tower.is_loaded != delay
    read(host)
    assert all(torch.equal(t, saved[n]) for n, t in host.state_dict().items())
    more = few | {n: saved[n] for n in saved if "trunk.blocks.0." in n}
    again = Host(folder, delay)
    route(again, more)
    with pytest.raises(ValueError, match=r"trunk\.blocks.* without the stamp"):
        read(again)
    whole = Host(folder, delay, "+whole")
    route(whole, more)
    read(whole)
    assert all(torch.equal(t, saved[n]) for n, t in whole.state_dict().items())


def test_trained_tensors_over_a_base_that_came_behind_the_hooks(folder, saved):
    host = Host(folder, True)
    behind(host, saved)
    few = {n: saved[n] + 1 for n in stitches(saved)}
    host.load_state_dict(few, strict=False)
    read(host)
    assert all(torch.equal(t, (saved | few)[n]) for n, t in host.state_dict().items() if "stamp" not in n)


def test_every_load_is_compared_again(folder, saved):
    """A run that goes on loads a checkpoint into a tower that is whole already, or was filled by load_model."""
    for host in (Host(folder, False), Host(folder, True)):
        host.tower.load_model()
        hooked(host, saved)
        assert host.tower.is_loaded
        hooked(host, {n: t for n, t in saved.items() if n != stitches(saved)[0]})
        with pytest.raises(ValueError, match="lacks 1 of"):
            host.tower(torch.zeros(1, 3, 56, 56))
        with pytest.raises(ValueError, match="lacks 1 of"):
            host.state_dict()
        with pytest.raises(ValueError, match="lacks 1 of"):
            host.half()


def test_a_tower_alone_tells_at_once(folder, saved):
    own = {n.removeprefix(PREFIX): t for n, t in saved.items()}
    tower = VSTVisionTower(f"vst:{folder}", ARGS)
    tower.load_state_dict(own)
    del own["stamp"]
    with pytest.raises(ValueError, match="without the stamp"):
        tower.load_state_dict(own, strict=False)


def test_an_old_checkpoint_loads_strictly(folder, saved):
    host = Host(folder, False)
    host.load_state_dict({n: t for n, t in saved.items() if not n.endswith(stamp.BYTES)}, strict=True)
    assert host.tower.is_loaded


def test_a_float32_copy_of_what_was_trained_in_bfloat16(folder):
    """DeepSpeed's conversion gives the optimizer's float32 weights for the bfloat16 ones that were stamped."""
    host = Host(folder, False)
    with torch.no_grad():
        for name, parameter in host.named_parameters():
            parameter.add_(1e-4 * torch.rand_like(parameter) if ".stitches." in name else 0)
    copies = {n: p.detach().clone() for n, p in host.named_parameters() if ".stitches." in n}
    host.bfloat16()
    state = {n: t.float() for n, t in host.state_dict().items()} | copies
    again = Host(folder, False)
    hooked(again, state)
    read(again)
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items() if "stamp" not in n)
    with pytest.raises(ValueError, match="other stitches"):
        hooked(again, {**state, stitches(state)[0]: state[stitches(state)[0]] + 0.1})


def test_a_base_without_a_tower_is_filled_from_the_folder(folder, saved):
    """Drawn numbers are not taken for a tower that lost its stamp."""
    host, plain = Host(folder, True), VSTVisionTower(f"vst:{folder}", ARGS).state_dict()
    behind(host, {})
    read(host)
    assert all(torch.equal(t, plain[n]) for n, t in host.tower.state_dict().items())


def test_a_copy_is_a_tower_of_its_own(folder, saved):
    host = Host(folder, False)
    twin = copy.deepcopy(host)
    hooked(twin, saved)
    assert twin.tower.is_loaded
    name = next(n for n in stitches(saved) if n.endswith("weight"))
    assert torch.equal(twin.state_dict()[name], saved[name])
    assert not torch.equal(host.state_dict()[name], saved[name])


def test_a_tower_that_went_wrong_is_told_when_it_is_saved(folder, caplog):
    host = Host(folder, False)
    host.state_dict()
    assert "not finite" not in caplog.text
    with torch.no_grad():
        next(p for n, p in host.named_parameters() if ".stitches." in n).fill_(float("nan"))
    state = {n: t.clone() for n, t in host.state_dict().items()}
    assert "not finite in 1 tensors (branches.clip.stitches" in caplog.text
    caplog.clear()
    again = Host(folder, True)
    hooked(again, state)
    assert again.tower.is_loaded
    assert "not finite in 1 tensors" in caplog.text
