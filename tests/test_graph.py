"""`MoEGraph` keeps what a plain `GraphModule` forgets, and tracing with known ranks stays dynamic in every size."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from moe_compiler.passes.graph import MoEGraph, rename_node, trace_module


class Everything(nn.Module):
    """Buffers of both kinds, parameters, children that are called, only read, or not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(3), persistent=False)
        self.register_buffer("mean", torch.ones(3))
        self.scale = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_parameter("nothing", None)
        self.linear = nn.Linear(3, 3)
        self.read = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        if shift is not None:
            x = x + shift
        if self.training:
            x = x * 0
        return self.linear(x) * self.scale + self.table + self.mean + self.read.weight.sum()


class Lambda(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def unpacked(x: Tensor) -> Tensor:
    batch, sequence, features = x.shape
    return x.view(-1, features).sum(0).expand(batch, sequence, features)


def all_but_last(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1]).sum(-1).view(*x.shape[:-1])


SHAPE_IDIOMS: dict[str, Callable[[Tensor], Tensor]] = {
    "unpacked": unpacked,
    "all but last": all_but_last,
    "starred": lambda x: x.reshape(-1).view(*x.shape),
    "as a whole": lambda x: x.reshape(-1).view(x.shape),
    "size()": lambda x: x.reshape(-1).view(x.size()),
    "size(dim)": lambda x: x.reshape(x.size(0), x.size(-1) * x.size(1)),
    "len": lambda x: x.sum(len(x.shape) - 1),
    "dim": lambda x: x.sum(x.dim() - 1) + x.ndim,
    "shape of a view": lambda x: x.view(-1, x.shape[-1]) * x.reshape((-1, x.shape[2])).shape[0],
}


@pytest.fixture
def module() -> Everything:
    return Everything().eval()


def traced(module: nn.Module) -> MoEGraph:
    graph = trace_module(module, ranks={"x": 3}, none_args=("shift",))
    graph.spec = {"kind": "test"}
    return graph


def test_graph_stands_in_for_the_module(module: Everything) -> None:
    graph = traced(module)
    x = torch.randn(2, 5, 3)
    assert torch.equal(graph(x), module(x))
    assert list(graph.state_dict()) == list(module.state_dict())
    assert graph.linear is module.linear
    assert graph.read is module.read
    assert graph.unused is module.unused
    assert graph.scale is module.scale
    assert graph.nothing is None
    assert graph._get_name() == "Everything"
    assert not graph.training
    assert not module.linear.training


def test_deepcopy_keeps_what_construction_kept(module: Everything) -> None:
    graph = traced(module)
    copied = copy.deepcopy(graph)
    x = torch.randn(2, 5, 3)
    assert type(copied).__mro__[1] is MoEGraph
    assert torch.equal(copied(x), module(x))
    assert list(copied.state_dict()) == list(module.state_dict())
    assert copied.spec == graph.spec
    assert copied._get_name() == "Everything"
    assert not copied.training
    assert copied.linear.weight is not graph.linear.weight
    assert copied.unused.weight is not graph.unused.weight


def test_a_graph_made_from_a_graph_keeps_it_too(module: Everything) -> None:
    first = traced(module)
    second = MoEGraph(first, copy.deepcopy(first.graph), "Second")
    second.add_module("added", nn.Linear(3, 3))
    assert second.spec == first.spec
    assert set(second.state_dict()) - set(module.state_dict()) == {"added.weight", "added.bias"}
    assert list(first.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("idiom", SHAPE_IDIOMS)
@settings(deadline=None, max_examples=10, derandomize=True)
@given(shape=st.tuples(*[st.integers(1, 5)] * 3))
def test_traced_shapes_stay_dynamic(idiom: str, shape: tuple[int, int, int]) -> None:
    module = Lambda(SHAPE_IDIOMS[idiom])
    graph = trace_module(module, ranks={"x": 3})
    x = torch.randn(shape)
    assert torch.equal(graph(x), module(x))


def test_unpacking_an_unknown_rank_fails() -> None:
    with pytest.raises(TraceError, match="cannot be iterated"):
        trace_module(Lambda(lambda x: x.view(-1, [*x.shape][-1])), ranks={})


def test_data_dependent_code_fails() -> None:
    with pytest.raises(TraceError, match="control flow"):
        trace_module(Lambda(lambda x: x if x.sum() > 0 else -x), ranks={"x": 3})


def test_training_branches_are_followed_as_in_eval_mode(module: Everything) -> None:
    x = torch.randn(2, 5, 3)
    expected = module(x)
    module.train()
    graph = traced(module)
    assert torch.equal(graph(x), expected)
    assert module.training
    assert graph.training


def test_an_argument_specialised_on_none_refuses_other_values(module: Everything) -> None:
    graph = traced(module)
    x = torch.randn(2, 5, 3)
    assert torch.equal(graph(x, shift=None), module(x))
    with pytest.raises(AssertionError, match="shift has been specialized to have value None"):
        graph(x, shift=x)


def test_an_argument_that_is_not_specialised_is_passed_on(module: Everything) -> None:
    graph = trace_module(module, ranks={"x": 3})
    x = torch.randn(2, 5, 3)
    assert torch.equal(graph(x, shift=x), module(x, x))


def in_place(x: Tensor) -> Tensor:
    x.add_(1)
    _ = x.shape
    return x


def test_unused_in_place_calls_stay_and_unused_reads_go() -> None:
    graph = trace_module(Lambda(in_place), ranks={"x": 3})
    x = torch.zeros(2, 3, 4)
    assert torch.equal(graph(x), torch.ones(2, 3, 4))
    assert [node.target for node in graph.graph.nodes if node.op == "call_method"] == ["add_"]


def test_rename_node() -> None:
    graph = trace_module(Lambda(lambda x: (x + 1) * 2), ranks={})
    _, add, mul, _ = graph.graph.nodes
    assert rename_node(add, "shifted").name == "shifted"
    assert rename_node(mul, "shifted").name == "shifted_1"
    graph.recompile()
    assert "shifted_1 = shifted * 2" in graph.code
    assert torch.equal(graph(torch.ones(2)), torch.full((2,), 4.0))


def test_print_readable(module: Everything, capsys: pytest.CaptureFixture[str]) -> None:
    text = traced(module).print_readable()
    assert capsys.readouterr().out == text + "\n"
    assert "linear = self.linear(x)" in text
    assert "No stacktrace" not in text
    assert traced(module).print_readable(print_output=False) == text
