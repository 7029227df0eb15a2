"""The report: a valid page that needs nothing else, with every figure and table that the model has data for."""

import base64
import builtins
import io
import re
import sys
from collections.abc import Hashable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import analysis_cases
import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import datasets, olmoe, tokens

from moe_compiler import dynamo_compile, write_report
from moe_compiler.graph_record import stages_before
from moe_compiler.passes.capture import capture_moe_blocks
from moe_compiler.report import adaptation, allocation, figure, graphs, joint, significance, similarity, tables
from moe_compiler.report.figure import evenly, layer_labels
from moe_compiler.report.layout import layered_layout
from moe_compiler.report.page import table_part
from moe_compiler.runtime.report import jensen_shannon

EVERY_FIGURE = {
    "token-utilization",
    "significance-by-dataset",
    "significance-map",
    "dynamics",
    "joint-distribution",
    "dataset-correlation",
    "channel-significance",
    "cosine-similarity",
    "similarity-by-layer",
    "expert-graphs",
    "clusters",
    "widths",
    "layer-sizes",
    "coverage",
    "slots-moved",
    "routing-divergence",
    "expected-error",
    "graph-captured",
    "graph-observed",
    "graph-lowered",
}
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Reads a page strictly: every element that opens closes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.cells: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.count[tag] = self.count.get(tag, 0) + 1
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag == "a":
            self.links.append(str(given["href"]))
        if tag == "img":
            self.images.append(given)
        if tag in ("td", "th"):
            self.cells.append("")
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture(scope="module", autouse=True)
def _coarse() -> Iterator[None]:
    """Figures of few pixels: what is tested is not their resolution."""
    before = figure._STYLE["savefig.dpi"]
    figure._STYLE["savefig.dpi"] = 30
    yield
    figure._STYLE["savefig.dpi"] = before


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A report on a model of two layers, with its figures in a folder."""
    model = analysis_cases.model()
    report = replace(model.moe_report, perplexities={"wiki & <co>": (10.0, 10.5)})
    model = SimpleNamespace(moe_report=report, runtime=model.runtime)
    folder = tmp_path_factory.mktemp("report")
    adaptations = [analysis_cases.adapt_report("law", report.analysis)]
    words = SimpleNamespace(decode=lambda ids: f"<token {ids[0]}>")
    path = write_report(
        model, folder / "report.html", tokenizer=words, figures=folder / "new" / "figures", adaptations=adaptations
    )
    return model, path


def test_the_page_is_valid_and_needs_nothing_else(written: tuple[Any, Path]) -> None:
    _, path = written
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert len(set(page.ids)) == len(page.ids)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert EVERY_FIGURE <= set(page.ids)
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,|#)", text)
    assert "url(" not in text
    assert page.count["figure"] == page.count["figcaption"] == page.count["img"] == len(EVERY_FIGURE)
    assert page.count["table"] == page.count["caption"] == page.count["thead"] == 8
    for image in page.images:
        assert image["alt"]
        picture = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition(",")[2])))
        assert picture.size == (int(str(image["width"])), int(str(image["height"])))


def test_figures_are_files_too(written: tuple[Any, Path]) -> None:
    _, path = written
    folder = path.parent / "new" / "figures"
    assert {one.stem for one in folder.iterdir()} == EVERY_FIGURE
    for file in folder.iterdir():
        assert len(set(Image.open(file).convert("L").tobytes())) > 8, file  # something is drawn
        assert base64.b64encode(file.read_bytes()).decode() in path.read_text(encoding="utf-8")
    assert sorted(one.name for one in path.parent.iterdir()) == ["new", "report.html"]


def test_tables_say_what_the_records_hold(written: tuple[Any, Path]) -> None:
    model, path = written
    cells = Page(path.read_text(encoding="utf-8")).cells
    report = model.moe_report
    assert f"{report.effective_bits:.3f}" in cells
    assert f"{report.code_bits:.3f}" in cells
    assert {"wiki & <co>", "10.000", "10.500", f"{100 * np.log(1.05):.3f}"} <= set(cells)
    for name, found in report.analysis.tokens.items():
        assert name in cells
        assert f"{int(found.counts.sum()):,}" in cells
        assert f'"<token {int(found.ids[0])}>"' in cells
    assert {f"model.layers.{i}.mlp" for i in range(2)} <= set(cells)
    assert "model.layers.*.mlp.experts.down_proj" in cells
    assert {"calibration", "law", "lowrank"} <= set(cells)
    assert "hessian_memory_bytes" in cells


def test_code_is_escaped(written: tuple[Any, Path]) -> None:
    assert "class lowered(nn.Module): &lt;&amp;&gt;" in written[1].read_text(encoding="utf-8")


def test_a_compiled_model_has_all_it_takes(tmp_path: Path) -> None:
    model = dynamo_compile(
        olmoe(num_hidden_layers=1), {"only": datasets()["low"]}, target_bits=4.5, quantizer="rtn", progress=False
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = write_report(model, tmp_path / "r.html").read_text(encoding="utf-8")
    assert {"profiles", "graph-lowered", "expert-graphs"} <= set(Page(text).ids)
    assert "OlmoeForCausalLM, compiled" in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    found = analysis_cases.analysis(1, 1, ("only",))
    bare = replace(next(iter(found.layers.values())), similarity=None, coactivation=None, centers=None)
    found = replace(found, layers={bare.path: bare})
    model = SimpleNamespace(moe_report=analysis_cases.compile_report(found))
    text = write_report(model, tmp_path / "r.html").read_text(encoding="utf-8")
    absent = {"joint-distribution", "cosine-similarity", "expert-graphs", "slots-moved", "profiles", "adaptation"}
    ids = set(Page(text).ids)
    assert not absent & ids
    assert "significance-map" in ids
    assert "token id" in Page(text).cells


def test_many_datasets_and_profiles_are_cut_and_said_so() -> None:
    found = analysis_cases.analysis(2, 4, tuple(f"data{i}" for i in range(9)))
    assert "Drawn are 7 of 9 datasets." in significance.significance_by_dataset(found).caption
    assert "Drawn are 4 of 9 datasets." in joint.joint_distribution(found).caption
    known = {name: analysis_cases.profile(name, found, i) for i, name in enumerate("abcdefg")}
    assert "Drawn are 5 of 6 other profiles." in adaptation.slots_moved(known, "a").caption


def test_linears_of_different_widths_have_a_map_each() -> None:
    found = analysis_cases.analysis(2, 4)
    layers = {
        path: replace(layer, bits={"gate_up_proj": (2, 2, 4, 4), "down_proj": (4, 4, 8, 8)})
        for path, layer in found.layers.items()
    }
    assert allocation._panels(list(found.layers.values())) == [("all linears", 0)]
    assert allocation._panels(list(layers.values())) == [("gate_up_proj", 0), ("down_proj", 1)]
    changed = replace(found, layers=layers)
    assert "in 3 colours" in allocation.width_map(changed).alt
    assert "triangles up and down" in allocation.clusters(changed).caption


def test_pairs_of_experts_are_the_strongest() -> None:
    matrix = torch.tensor([[9.0, 1, 5, 2], [1, 9, 3, 4], [5, 3, 9, 6], [2, 4, 6, 9]])
    assert similarity._strongest(matrix, 2) == 3.0  # four of the six pairs
    assert similarity._strongest(matrix, 9) == 1.0


def test_slots_and_divergence_are_those_of_the_profiles() -> None:
    found = analysis_cases.analysis(2, 6)
    known = {name: analysis_cases.profile(name, found, seed) for seed, name in enumerate(("calibration", "law"))}
    slots = adaptation.slots_by_expert(known["law"])
    for path, values in slots.items():
        total = sum(pool.offset.diff() for (block, _), pool in known["law"].pools.items() if block == path)
        assert values.tolist() == total.tolist()
        assert values.sum() == 2 * analysis_cases.SLOTS
    by_layer, mean = adaptation.divergence_matrix(known)
    expected = [
        float(jensen_shannon(known["calibration"].histograms[path], known["law"].histograms[path])) for path in slots
    ]
    np.testing.assert_allclose(by_layer[:, 1], expected)
    np.testing.assert_allclose(by_layer[:, 0], 0, atol=1e-12)
    np.testing.assert_allclose(mean, [[0, np.mean(expected)], [np.mean(expected), 0]], atol=1e-12)


def test_coverage_puts_layers_together() -> None:
    report = analysis_cases.model(layers=3).moe_report
    groups = report.groups()
    assert [group.linears for group in groups] == [3, 3, 3]
    assert sum(group.weights for group in groups) == sum(entry.weights for entry in report.coverage)
    assert sum(group.size_bytes for group in groups) == sum(entry.size_bytes for entry in report.coverage)


@given(seed=st.integers(0, 10**6), size=st.integers(1, 14), density=st.floats(0, 0.6))
@settings(deadline=None, max_examples=40)
def test_layouts_point_downwards_without_overlaps(seed: int, size: int, density: float) -> None:
    draw = np.random.default_rng(seed)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(size))
    graph.add_edges_from((a, b) for a in range(size) for b in range(a + 1, size) if draw.random() < density)
    widths: dict[Hashable, float] = {node: float(draw.uniform(0.1, 3)) for node in graph}
    places, routes = layered_layout(graph, widths, gap=0.25)
    for a, b in graph.edges:
        route = routes[a, b]
        assert route[0] == places[a]
        assert route[-1] == places[b]
        assert all(lower[1] == upper[1] - 1 for upper, lower in pairwise(route))
    for a in graph:
        for b in range(a):
            if places[a][1] == places[b][1]:
                assert abs(places[a][0] - places[b][0]) >= (widths[a] + widths[b]) / 2 + 0.25 - 1e-9
    for (a, b), route in routes.items():
        for x, y in route[1:-1]:
            boxes = [node for node in graph if places[node][1] == y and node not in (a, b)]
            assert all(abs(places[node][0] - x) >= widths[node] / 2 + 0.25 - 1e-9 for node in boxes)


def test_a_layout_needs_a_graph_without_cycles() -> None:
    with pytest.raises(ValueError, match=r"`graph` must have no cycle, but has one"):
        layered_layout(nx.DiGraph([(0, 1), (1, 0)]), {0: 1.0, 1: 1.0})


def test_drawn_graphs_leave_sizes_out_and_gather_tensors() -> None:
    block = next(iter(capture_moe_blocks(olmoe(num_hidden_layers=1), tokens(1, 4)).values()))
    record = stages_before(block)["observed"]
    graph, label, kind = graphs.drawable(record)
    texts = set(label.values())
    assert not any(".size()" in text for text in texts)
    assert "gate\nmodule OlmoeTopKRouter" in texts
    assert "token_weight\nand 3 more tensors" in texts
    assert sum(kind[node] == "observer" for node in graph) == 4
    assert nx.is_directed_acyclic_graph(graph)
    assert set(graph) == label.keys() == kind.keys()


def test_names_of_layers_are_short() -> None:
    assert layer_labels(["model.layers.3.mlp", "model.layers.11.mlp"]) == ["3", "11"]
    assert layer_labels(["encoder.block", "decoder.block"]) == ["0", "1"]
    assert layer_labels(["a.1.x", "b.1.y"]) == ["0", "1"]
    assert evenly(["a", "b", "c", "d", "e"], 3) == ["a", "c", "e"]
    assert evenly(["a", "b"], 3) == ["a", "b"]


def test_columns_of_numbers_are_marked() -> None:
    html = table_part("t", "T", "c", ("name", "n", "x"), [("a", 1200, 0.5), ("b", 3, 2.0)]).html
    assert '<td class="number">1,200</td><td class="number">0.500</td>' in html
    assert '<th scope="row">a</th>' in html
    assert '<th scope="col" class="number">n</th>' in html


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    model = analysis_cases.model()
    target = tmp_path / "r.html"
    with pytest.raises(TypeError, match=r"`model` must have been compiled by dynamo_compile, but this object was not"):
        write_report(object(), target)
    without = SimpleNamespace(moe_report=replace(model.moe_report, analysis=None))
    with pytest.raises(ValueError, match=r"`model.moe_report.analysis` is None, so there is nothing to report"):
        write_report(without, target)
    with pytest.raises(FileNotFoundError, match=r"`path` must lie in a folder that exists, but .*absent does not"):
        write_report(model, tmp_path / "absent" / "r.html")
    with pytest.raises(TypeError, match=r"`adaptations` must hold what `adapt` returned, but holds a str"):
        write_report(model, target, adaptations=["law"])  # type: ignore[list-item]
    other = analysis_cases.adapt_report("law", analysis_cases.analysis(1, 4))
    with pytest.raises(ValueError, match=r"`adaptations` must be of this model, but 'law' has other MoE blocks"):
        write_report(model, target, adaptations=[other])
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RuntimeError, match=r"needs matplotlib, which is not installed: pip install 'moe-compiler\["):
        write_report(analysis_cases.model(), tmp_path / "r.html")


def test_figures_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`figures` must be a folder, but .*file is a file"):
        write_report(analysis_cases.model(), tmp_path / "r.html", figures=tmp_path / "file")
    assert not (tmp_path / "r.html").exists()


def test_drawing_leaves_no_trace_in_matplotlib() -> None:
    import matplotlib

    before, had_pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    assert significance.dynamics_map(analysis_cases.analysis(1, 4)).png.startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_errors_left_are_those_of_the_reports() -> None:
    found = analysis_cases.analysis(1, 4)
    report = analysis_cases.adapt_report("law", found)
    changes = [change for layer in report.layers for change in layer.linears]
    expected = sum(change.error_after for change in changes) / sum(change.error_before for change in changes)
    assert tables._error_left(report) == pytest.approx(expected)
    left = adaptation.errors_left([report])
    assert left.shape == (1, 1, 2)
    assert left.ravel().tolist() == [100 * change.error_after / change.error_before for change in changes]
