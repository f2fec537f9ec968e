"""The page: self-contained, its pictures well-formed, everything inside its frame, nothing over anything else."""

import dataclasses
import itertools
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxtrain.config import MESH_AXES, Config, MeshConfig, PipelineConfig
from jaxtrain.mesh import make_mesh
from jaxtrain.planner.estimates import Cluster, Estimate
from jaxtrain.planner.page import render
from jaxtrain.planner.pictures import coordinates, gantt_picture, map_picture, memory_picture, mesh_picture, time_picture
from jaxtrain.planner.svg import GLYPH
from tests.planner.plans import CLUSTER, SEVENTY, make_estimate, make_layout, make_plan, make_search

Element = ElementTree.Element


def piped(pipe: int = 4, microbatches: int = 16, chunks: int = 1, hosts: int = 16, **mesh: int) -> Estimate:
    config = make_layout(pipe=pipe, microbatches=microbatches, fsdp=hosts * 8 // (8 * pipe), tensor=8)
    schedule = "interleaved" if chunks > 1 else "1f1b"
    config = dataclasses.replace(config, pipeline=PipelineConfig(schedule, chunks))
    return make_estimate(config, Cluster(CLUSTER.chip, hosts))


PICTURES = {
    "mesh": mesh_picture(piped()),
    "mesh of 2048 hosts": mesh_picture(piped(pipe=16, hosts=2048)),
    "mesh of one device": mesh_picture(make_estimate(make_layout(), Cluster(CLUSTER.chip, 1, 1))),
    "mesh of racks": mesh_picture(make_estimate(make_layout(pipe=4, fsdp=9, tensor=8), Cluster(CLUSTER.chip, 4, 72))),
    "schedule": gantt_picture(piped()),
    "long schedule": gantt_picture(piped(pipe=16, microbatches=128, hosts=128)),
    "interleaved": gantt_picture(piped(chunks=4, microbatches=8)),
    "one stage": gantt_picture(make_estimate(make_layout(fsdp=128))),
    "memory": memory_picture(make_search().ranked[:8]),
    "time": time_picture(make_search().ranked[:8]),
    "map": map_picture(make_search().points, make_search().pareto, make_search().ranked),
}


@pytest.fixture(params=PICTURES, scope="module")
def picture(request: pytest.FixtureRequest) -> Element:
    return ElementTree.fromstring(PICTURES[request.param])


def frame(picture: Element) -> tuple[float, float]:
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    return width, height


def extent(words: Element) -> tuple[float, float, float, float]:
    """Left, right, top, bottom of a text, by the mean width of its letters."""
    x, y, size = (float(words.attrib[name]) for name in ("x", "y", "font-size"))
    width = GLYPH * size * len(words.text or "")
    left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[words.attrib.get("text-anchor", "start")]
    return left, left + width, y - size * 0.75, y + size * 0.25


def test_nothing_leaves_the_frame(picture: Element):
    width, height = frame(picture)
    for box in picture.iter("rect"):
        x, y, w, h = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert -0.01 <= x <= x + w <= width + 0.01
        assert -0.01 <= y <= y + h <= height + 0.01
    for dot in picture.iter("circle"):
        assert 0 <= float(dot.attrib["cx"]) <= width
        assert 0 <= float(dot.attrib["cy"]) <= height
    for words in picture.iter("text"):
        left, right, top, bottom = extent(words)
        assert -0.5 <= left < right <= width + 0.5, words.text
        assert -0.5 <= top < bottom <= height + 3, words.text


def test_no_words_over_other_words(picture: Element):
    texts = [(extent(words), words.text) for words in picture.iter("text")]
    for ((l1, r1, t1, b1), one), ((l2, r2, t2, b2), other) in itertools.combinations(texts, 2):
        assert not (l1 < r2 and l2 < r1 and t1 < b2 and t2 < b1), f"{one!r} and {other!r} overlap"


def test_boxes_of_hosts_lie_apart_and_hold_their_devices():
    picture = ElementTree.fromstring(PICTURES["mesh"])
    boxes = [[float(box.attrib[name]) for name in ("x", "y", "width", "height")] for box in picture.iter("rect")]
    hosts = [box for box, rect in zip(boxes, picture.iter("rect"), strict=True) if rect.attrib.get("class") == "host"]
    devices = [box for box in boxes if box not in hosts]
    assert (len(hosts), len(devices)) == (16, 128)
    for (x1, y1, w1, h1), (x2, y2, w2, h2) in itertools.combinations(hosts, 2):
        assert x1 + w1 <= x2 or x2 + w2 <= x1 or y1 + h1 <= y2 or y2 + h2 <= y1
    for x, y, w, h in devices:
        inside = [host for host in hosts if host[0] <= x and x + w <= host[0] + host[2]]
        assert sum(host[1] <= y and y + h <= host[1] + host[3] for host in inside) == 1


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a jax.Device as a mesh needs."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"

    @property
    def slice_index(self) -> int:
        return self.process_index


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=4, tensor=4), MeshConfig(pipe=2, fsdp=4, tensor=2), MeshConfig(data=2, fsdp=8)]
)
def test_devices_stand_where_the_mesh_puts_them(mesh: MeshConfig):
    devices = [Device(host * 8 + local, host) for host in range(2) for local in range(8)]
    real = make_mesh(mesh, devices).devices
    for place in np.ndindex(real.shape):
        device = real[place]
        assert tuple(coordinates(mesh.shape, 8)[device.process_index, device.id % 8]) == place


def test_memory_bars_are_as_long_as_they_say():
    ranked = make_search().ranked[:8]
    picture = ElementTree.fromstring(memory_picture(ranked))
    bars: dict[str, float] = {}
    for box in picture.iter("rect"):
        if box.find("title") is not None:
            bars[box.attrib["y"]] = bars.get(box.attrib["y"], 0.0) + float(box.attrib["width"])
    lengths = np.array(list(bars.values()))
    totals = np.array([estimate.memory.total for estimate in ranked])
    np.testing.assert_allclose(lengths / lengths[0], totals / totals[0], rtol=1e-3)


def test_the_page_needs_nothing_from_outside():
    page = render(make_plan(tokens=15e12))
    assert not re.search(r"https?:|<script|@import|url\(|<link|src=", page)
    assert page.count("<svg") == 5
    for name in ("Why this one", "What limits it", "What would change the answer", "The whole run", "The ranking"):
        assert f">{name}<" in page
    for inner in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(inner)
    opened = [tag for tag in re.findall(r"<(/?(?:section|div|figure|table|tr|td|th|p|h\d|main|body|html))\b", page)]
    for tag in set(opened):
        assert opened.count(tag) == opened.count(tag[1:] if tag[0] == "/" else "/" + tag), tag


def test_names_are_escaped():
    config = dataclasses.replace(SEVENTY, name="<b>&")
    page = render(make_plan(config))
    assert "<b>&amp;" not in page
    assert "&lt;b&gt;&amp;" in page


def test_the_map_marks_the_first_and_the_front():
    found = make_search()
    picture = ElementTree.fromstring(map_picture(found.points, found.pareto, found.ranked))
    classes = [dot.attrib["class"] for dot in picture.iter("circle")]
    assert classes.count("winner") == 1
    assert classes.count("on-front") == len(found.pareto)
    assert any("faint" in name for name in classes)
    (front,) = picture.iter("polyline")
    heights = [float(pair.split(",")[1]) for pair in front.attrib["points"].split()]
    assert heights == sorted(heights)  # more memory, less time: down the page
    assert math.isfinite(sum(heights))
    assert len(MESH_AXES) == len(found.points[0].mesh)
    assert isinstance(SEVENTY, Config)
