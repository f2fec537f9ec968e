"""The pictures of the READMEs show what today's code draws: each holds a hash of what it was made from."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from tests import pictures


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_no_picture_is_older_than_what_it_shows(name: str):
    assert not pictures.is_stale(name), f"{name} is out of date: python -m tests.pictures {name}"


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("README.md", ".github/quickstart.png"),
        ("README.md", ".github/rewards.png"),
        ("jaxtrain/parallel/README.md", "replicas.svg"),
        ("jaxtrain/planner/README.md", "plan.svg"),
    ],
)
def test_a_readme_shows_each_picture(page: str, name: str):
    assert f"({name})" in (pictures.ROOT / page).read_text()
    assert str((pictures.ROOT / page).parent.relative_to(pictures.ROOT) / name) in pictures.PICTURES


def test_every_link_of_a_readme_leads_somewhere():
    pages = [*pictures.ROOT.glob("*.md"), *pictures.ROOT.glob(".github/*.md"), *pictures.ROOT.glob("tests/*.md")]
    pages += pictures.ROOT.glob("jaxtrain/*/*.md")
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert len(links) >= 15
    assert [(str(page), link) for page, link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_change_of_code_makes_a_picture_stale_and_a_comment_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str
):
    code, path = tmp_path / "code.py", tmp_path / f"one{suffix}"
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    monkeypatch.setattr(pictures, "PICTURES", {path.name: pictures.Picture(lambda p: draw(p), ("code.py",))})
    code.write_text("size = 1\n")
    assert pictures.is_stale(path.name)
    pictures.main([])
    assert not pictures.is_stale(path.name)
    code.write_text("size = 1  # small\n")
    assert not pictures.is_stale(path.name)
    code.write_text("size = 2\n")
    assert pictures.is_stale(path.name)


def draw(path: Path) -> None:
    path.write_text("<svg></svg>") if path.suffix == ".svg" else Image.new("RGB", (2, 2)).save(path)


def test_pictures_below_each_other_are_one_valid_file():
    whole = ElementTree.fromstring(
        pictures.stack(['<svg viewBox="0 0 10 20"><title>a</title></svg>', '<svg viewBox="0 0 10 5"/>'])
    )
    assert whole.get("viewBox") == "0 0 58 97"
    assert [part.get("y") for part in whole if part.tag.endswith("svg")] == ["24", "68"]


@pytest.mark.parametrize("name", [name for name in pictures.PICTURES if name.endswith(".svg")])
def test_parts_of_a_picture_have_sizes_of_their_own(name: str):
    """A width of every svg, as the page gives, would lay the parts over each other."""
    assert not re.search(r"(?m)^svg \{", (pictures.ROOT / name).read_text())
