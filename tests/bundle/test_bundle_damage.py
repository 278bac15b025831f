"""Whatever is wrong with a bundle is told in one sentence that names it, before anything is put in place."""

import json
import shutil
import tarfile

import pytest
from bundle_kit import MADE, bundle, file_header, forge, refusal, toy, tree_of_files, unbundle

from vst.bundle import placing
from vst.bundle.manifest import read_manifest

__all__ = ["toy"]


@pytest.fixture
def made(toy, tmp_path):
    bundle(tmp_path / "out", "--for", "toy", "--made")
    return tmp_path / "out"


def cut(out):
    (out / "part-0002").write_bytes((out / "part-0002").read_bytes()[:-1])


def lengthen(out):
    (out / "part-0002").write_bytes((out / "part-0002").read_bytes() + b"x")


def damage(out):
    content = bytearray((out / "part-0003").read_bytes())
    content[7] ^= 1
    (out / "part-0003").write_bytes(content)


def swap(out):
    (out / "part-0002").rename(out / "x")
    (out / "part-0003").rename(out / "part-0002")
    (out / "x").rename(out / "part-0003")


def edit(change):
    def do(out):
        values = json.loads((out / "manifest.json").read_text())
        change(values)
        (out / "manifest.json").write_text(json.dumps(values))

    return do


DAMAGES = {
    "missing": (lambda out: (out / "part-0002").unlink(), ["lacks part-0002", "copy what is missing"]),
    "cut": (cut, ["part-0002", "1999 bytes; expected 2000", "it was cut", "copy part-0002 again"]),
    "longer": (lengthen, ["part-0002", "2001 bytes; expected 2000", "copy part-0002 again"]),
    "damaged": (damage, ["part-0003 is damaged, or of another bundle", "copy part-0003 again"]),
    "names mixed": (swap, ["part-0002 holds what part-0003 should"]),
    "foreign file": (lambda out: (out / "notes.txt").write_text("x"), ["notes.txt is no part", "take it away"]),
    "foreign part": (lambda out: (out / "part-0999").write_text("x"), ["part-0999 is a part of another bundle"]),
    "no manifest": (lambda out: (out / "manifest.json").unlink(), ["has no manifest.json", "copy that file too"]),
    "cut manifest": (
        lambda out: (out / "manifest.json").write_text((out / "manifest.json").read_text()[:-50]),
        ["manifest.json is no valid JSON", "copy the file again"],
    ),
    "edited manifest": (edit(lambda v: v["members"].pop()), ["manifest.json is damaged", "copy the file again"]),
    "other version": (edit(lambda v: v.update(version=7)), ["format version 7 and this vst reads 1", "same version"]),
    "another file": (edit(lambda v: v.update(format="x")), ["manifest.json is not the manifest of a bundle"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_nothing_is_put_in_place(made, tmp_path, name):
    do, wanted = DAMAGES[name]
    do(made)
    said = refusal(unbundle, made, tmp_path / "there")
    assert all(part in said for part in wanted), said
    assert not (tmp_path / "there").exists()


def test_a_part_of_another_bundle_of_the_same_size(made, tmp_path):
    shutil.copy(made / "part-0001", made / "part-0002")
    assert "part-0002 holds what part-0001 should" in refusal(unbundle, made, tmp_path / "there")


def test_no_folder(tmp_path):
    assert "is no folder; expected one that vst bundle wrote" in refusal(unbundle, tmp_path / "no", tmp_path / "there")


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/x",
        "home/../../x",
        "home//x",
        "home/archives/../../x",
        "elsewhere/x",
        "home",
        "hub/.x",
        "hub/a\\b",
        "hub/a\nb",
        "",
    ],
)
def test_a_path_that_leaves_its_place_is_refused(tmp_path, path):
    out = forge(tmp_path / "out", [(file_header(path, 1), b"x")], [(path, b"x")])
    said = refusal(unbundle, out, tmp_path / "there")
    assert "manifest.json names a member" in said
    assert repr(path) in said
    assert "nothing is put in place" in said
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("path", ["home/ready.json", "home/digests.json", "home/other/x"])
def test_what_is_of_no_asset_does_not_come_beside_them(tmp_path, path):
    out = forge(tmp_path / "out", [(file_header(path, 1), b"x")], [(path, b"x")])
    assert "of no asset" in refusal(unbundle, out, tmp_path / "there")


@pytest.mark.parametrize(
    ("header", "content", "told"),
    [
        (file_header("wheels/a", 0, tarfile.SYMTYPE, "/etc/passwd"), b"", "the link 'wheels/a'"),
        (file_header("wheels/a", 0, tarfile.LNKTYPE, "wheels/b"), b"", "the link 'wheels/a'"),
        (file_header("wheels/a", 0, tarfile.DIRTYPE), b"", "the folder or device 'wheels/a'"),
        (file_header("wheels/a", 0, tarfile.FIFOTYPE), b"", "the folder or device 'wheels/a'"),
        (file_header("../x", 3), b"abc", "the file '../x' of 3 bytes"),
        (file_header("wheels/a", 2), b"ab", "the file 'wheels/a' of 2 bytes"),
    ],
)
def test_a_stream_that_holds_something_else_is_refused(tmp_path, header, content, told):
    """Though every part's digest is right."""
    out = forge(tmp_path / "out", [(header, content)], [("wheels/a", b"abc")])
    said = refusal(unbundle, out, tmp_path / "there")
    assert f"part-0001 holds {told}" in said
    assert "nothing is put in place" in said
    assert tree_of_files(tmp_path / "there") == {}
    assert not (tmp_path / "x").exists()


def test_a_stream_with_other_bytes_or_more_or_fewer_files_is_refused(tmp_path):
    a, b = ((file_header(f"wheels/{n}", 3), b"abc") for n in "ab")
    said = refusal(unbundle, forge(tmp_path / "1", [a], [("wheels/a", b"abd")]), tmp_path / "there")
    assert "wheels/a (in part-0001) is not what the manifest tells" in said
    said = refusal(unbundle, forge(tmp_path / "2", [a, b], [("wheels/a", b"abc")]), tmp_path / "there")
    assert "holds more than the manifest names" in said
    said = refusal(
        unbundle, forge(tmp_path / "3", [a], [("wheels/a", b"abc"), ("wheels/b", b"abc")]), tmp_path / "there"
    )
    assert "holds nothing more where the manifest names the file 'wheels/b'" in said
    assert not [p for p in (tmp_path / "there").rglob("*") if p.is_file() and ".unbundle-" not in str(p)]


def test_members_twice_or_as_a_file_and_a_folder_are_refused(tmp_path):
    for name, paths in (("1", ["wheels/a", "wheels/a"]), ("2", ["wheels/a", "wheels/a/b"])):
        out = forge(tmp_path / name, [(file_header(p, 1), b"x") for p in paths], [(p, b"x") for p in paths])
        assert "twice, or as a file and a folder" in refusal(unbundle, out, tmp_path / "there")


def test_parts_in_subfolders_do_not_matter(made, tmp_path):
    (made / "stick").mkdir()
    for name in ("part-0004", "part-0001"):
        (made / name).rename(made / "stick" / name)
    unbundle(made, tmp_path / "there")
    assert (tmp_path / "there/grows/deep/content").read_bytes() == MADE["grows"]


def test_room_is_looked_at_before(made, tmp_path, monkeypatch):
    total = sum(m.size for m in read_manifest(made).members)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda path: usage._replace(free=total - 1))
    said = refusal(unbundle, made, tmp_path / "there")
    assert "has room for 12.3 kB, and the bundle takes 12.3 kB there: make room, or give another folder" in said
    assert tree_of_files(tmp_path / "there") == {}
    monkeypatch.setattr(placing.shutil, "disk_usage", lambda path: usage._replace(free=total))
    unbundle(made, tmp_path / "there")
