"""The page: self-contained, its pictures well-formed, everything inside its frame, nothing over anything else."""

import dataclasses
import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath

from jaxtrain.config import MESH_AXES, Config, MeshConfig, PipelineConfig
from jaxtrain.mesh import make_mesh
from jaxtrain.planner.estimates import Cluster, Estimate
from jaxtrain.planner.page import render
from jaxtrain.planner.pictures import (
    LIGHT,
    coordinates,
    gantt_picture,
    map_picture,
    memory_picture,
    mesh_picture,
    svg,
    time_picture,
)
from jaxtrain.planner.wording import GIBI
from tests.planner.plans import CLUSTER, SEVENTY, make_estimate, make_layout, make_plan, make_search

Element = ElementTree.Element


def piped(pipe: int = 4, microbatches: int = 16, chunks: int = 1, hosts: int = 16, **mesh: int) -> Estimate:
    config = make_layout(pipe=pipe, microbatches=microbatches, fsdp=hosts * 8 // (8 * pipe), tensor=8)
    schedule = "interleaved" if chunks > 1 else "1f1b"
    config = dataclasses.replace(config, pipeline=PipelineConfig(schedule, chunks))
    return make_estimate(config, Cluster(CLUSTER.chip, hosts))


def unknown_budget() -> list[Estimate]:
    chip = dataclasses.replace(CLUSTER.chip, memory_bytes=None)
    return [make_estimate(make_layout(fsdp=128), Cluster(chip, 16))]


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
    "memory, budget not known": memory_picture(unknown_budget()),
    "map, budget not known": map_picture((), unknown_budget(), unknown_budget()),
    "time": time_picture(make_search().ranked[:8]),
    "map": map_picture(make_search().points, make_search().pareto, make_search().ranked),
}


@pytest.fixture(params=PICTURES, scope="module")
def picture(request: pytest.FixtureRequest) -> Figure:
    return PICTURES[request.param]


def extent(words: Element) -> tuple[float, float, float, float]:
    """Left, right, top, bottom of a text."""
    style, x, y = words.attrib["style"], float(words.attrib["x"]), float(words.attrib["y"])
    size = float(re.findall(r"([\d.]+)px", style)[0])
    box = TextPath((0, 0), words.text or "", size).get_extents()
    (anchor,) = re.findall(r"text-anchor: (\w+)", style) or ["start"]
    left = x - box.width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
    return left, left + box.width, y - box.y1, y - box.y0


def test_nothing_leaves_the_frame(picture: Figure):
    drawn, frame = picture.get_tightbbox(), picture.bbox_inches
    assert -0.02 <= drawn.x0 < drawn.x1 <= frame.x1 + 0.02
    assert -0.02 <= drawn.y0 < drawn.y1 <= frame.y1 + 0.02


def test_no_words_over_other_words(picture: Figure):
    texts = [(extent(words), words.text) for words in ElementTree.fromstring(svg(picture)).iter("text")]
    assert texts
    for ((l1, r1, t1, b1), one), ((l2, r2, t2, b2), other) in itertools.combinations(texts, 2):
        assert not (l1 < r2 and l2 < r1 and t1 < b2 and t2 < b1), f"{one!r} and {other!r} overlap"


def test_boxes_of_hosts_lie_apart_and_hold_their_devices():
    (axes,) = PICTURES["mesh"].axes
    hosts = [host.get_window_extent() for host in axes.findobj(FancyBboxPatch)]
    devices = [device.get_window_extent() for device in axes.findobj(Rectangle) if device.get_url()]
    assert (len(hosts), len(devices)) == (16, 128)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(hosts, 2))
    assert not any(one.overlaps(other) for one, other in itertools.combinations(devices, 2))
    for device in devices:
        assert sum(host.containsx(x) and host.containsy(y) for host in hosts for x, y in (device.min, device.max)) == 2


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
    (axes,) = memory_picture(ranked).axes
    lengths = sum(np.array([bar.get_width() for bar in bars]) for bars in axes.containers)
    np.testing.assert_allclose(lengths, [estimate.memory.total / GIBI for estimate in ranked])


def test_the_page_needs_nothing_from_outside():
    page = render(make_plan(tokens=15e12))
    assert not re.search(r"https?:|<script|@import|url\(|<link|src=", page)
    assert page.count("<svg") == 5
    for name in ("Why this one", "What limits it", "What would change the answer", "The whole run", "The ranking"):
        assert f">{name}<" in page
    for inner in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert ElementTree.fromstring(inner).attrib["aria-label"]
    assert "fsdp=128: 6.15 s, 24.7 GiB</title>" in page
    assert not [colour for colour in LIGHT.values() if colour in page.partition("</style>")[2]]
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
    (axes,) = map_picture(found.points, found.pareto, found.ranked).axes
    *_, front, winner = axes.collections
    assert np.shape(winner.get_offsets()) == (1, 2)
    heights = np.asarray(front.get_offsets())[:, 1]
    assert len(heights) == len(found.pareto)
    assert list(heights) == sorted(heights, reverse=True)  # more memory, less time
    assert len(MESH_AXES) == len(found.points[0].mesh)
    assert isinstance(SEVENTY, Config)
