"""Tracing a module into a graph that is dynamic in every size and keeps what a `GraphModule` forgets."""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer

_READS = ("size", "dim")
_NO_SOURCE_LINE = "# No stacktrace found for following nodes"


class MoEGraph(GraphModule):
    """A `GraphModule` that stands in for the module it was traced from.

    A plain `GraphModule` drops children, parameters and buffers that its graph does not mention, makes every
    buffer persistent, and loses plain attributes when it is copied. This one keeps all of them, over
    construction and `copy.deepcopy`, so that the keys of `state_dict` stay the same. Parameters and children
    are shared, not copied. As in any `GraphModule`, forward hooks do not survive `deepcopy`.

    Attributes:
        spec: what the graph computes: an `ExpertsSpec` for a captured graph, `None` otherwise.

    Args:
        root: the module whose children, parameters, buffers and `training` flag the graph takes over.
        graph: the graph.
        class_name: the name that printed code shows.
    """

    spec: Any

    def __init__(self, root: nn.Module, graph: Graph, class_name: str = "MoEGraph") -> None:
        super().__init__(root, graph, class_name)
        self._modules = dict(root._modules)
        self._parameters = dict(root._parameters)
        self._buffers = dict(root._buffers)
        self._non_persistent_buffers_set = set(root._non_persistent_buffers_set)
        self.spec = root.__dict__.get("spec")

    def __deepcopy__(self, memo: dict[int, Any]) -> MoEGraph:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, MoEGraph)
        copied.__class__.__name__ = self.__class__.__name__
        copied._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        copied.spec = copy.deepcopy(self.spec, memo)
        return copied

    def print_readable(self, print_output: bool = True, *args: Any, **kwargs: Any) -> str:
        """Return the code of the graph and of the graphs in it; print it unless `print_output` is false.

        The note that `GraphModule` puts before nodes whose source line is unknown is left out.
        """
        lines = super().print_readable(False, *args, **kwargs).splitlines(keepends=True)
        text = "".join(line for line in lines if line.strip() != _NO_SOURCE_LINE)
        if print_output:
            print(text)
        return text


class RankProxy(Proxy):
    """A proxy that may know the rank of its tensor.

    Its `shape` is then a plain tuple of `size(i)` nodes: `*x.shape`, `len(x.shape)`, `x.shape[:-1]` and
    `b, s, h = x.shape` all trace, and the graph holds no number of the example that was traced.
    """

    rank: int | None = None

    @property
    def shape(self) -> Any:
        """A tuple of sizes, or an attribute node where the rank is unknown."""
        return self.__getattr__("shape") if self.rank is None else self._sizes()

    def size(self, *args: Any, **kwargs: Any) -> Any:
        """Return `shape`, or the size of one dimension."""
        return self._call("size", args, kwargs) if args or kwargs or self.rank is None else self._sizes()

    def dim(self) -> Any:
        """Return the rank."""
        return self._call("dim", (), {}) if self.rank is None else self.rank

    @property
    def ndim(self) -> Any:
        """The rank."""
        return self.dim()

    def view(self, *args: Any, **kwargs: Any) -> Any:
        """Record `Tensor.view`; the result knows its rank if the sizes are given one by one or as a tuple."""
        return self._reshaped("view", args, kwargs)

    def reshape(self, *args: Any, **kwargs: Any) -> Any:
        """Record `Tensor.reshape`; the result knows its rank as in `view`."""
        return self._reshaped("reshape", args, kwargs)

    def _sizes(self) -> tuple[Any, ...]:
        assert self.rank is not None
        return tuple(self._call("size", (i,), {}) for i in range(self.rank))

    def _reshaped(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
        result = self._call(method, args, kwargs)
        if not kwargs and all(isinstance(size, int | Proxy) for size in sizes):
            ambiguous = len(sizes) == 1 and isinstance(sizes[0], Proxy)  # one size, or a whole `torch.Size`
            result.rank = None if ambiguous else len(sizes)
        return result

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.tracer.create_proxy("call_method", method, (self, *args), kwargs)


class MoETracer(Tracer):
    """Traces a module with all of its children as leaves: only the glue between them becomes nodes.

    Args:
        ranks: the number of dimensions of each tensor argument, by name; without it an argument's `shape`
            cannot be unpacked.
    """

    def __init__(self, ranks: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.ranks = dict(ranks or {})

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Treat every child as a leaf."""
        return True

    def proxy(self, node: Node) -> RankProxy:
        """Make a proxy that knows its rank if `node` is an argument named in `ranks`."""
        proxy = RankProxy(node, self)
        if node.op == "placeholder":
            proxy.rank = self.ranks.get(str(node.target))
        return proxy


def trace_module(
    module: nn.Module,
    *,
    ranks: Mapping[str, int],
    none_args: Collection[str] = (),
    class_name: str | None = None,
) -> MoEGraph:
    """Trace `module` as it behaves in inference. Nothing in `module` is changed.

    Branches on `self.training` are followed as in eval mode, so the graph is for inference only. Nodes that
    read a size or an element and are not used are dropped; nothing else is, as a method call may work in
    place.

    Args:
        module: what to trace; its children are called as modules (`call_module` nodes).
        ranks: the number of dimensions of each tensor argument, by name.
        none_args: arguments to specialise on `None`; the graph then refuses any other value for them.
        class_name: the name that printed code shows; by default that of the module's class.

    Returns:
        The graph, with the same children, parameters, buffers and arguments as `module`.

    Raises:
        torch.fx.proxy.TraceError: the module's code depends on the values of a tensor.
    """
    training = module.training
    module.training = False
    try:
        graph = MoETracer(ranks).trace(module, concrete_args=dict.fromkeys(none_args) or None)
    finally:
        module.training = training
    _name_arguments(graph, none_args)
    for node in reversed(list(graph.nodes)):
        read = node.target in _READS if node.op == "call_method" else node.target is operator.getitem
        if read and not node.users:
            graph.erase_node(node)
    graph.lint()
    return MoEGraph(module, graph, class_name or type(module).__name__)


def rename_node(node: Node, name: str) -> Node:
    """Give `node` a name that reads well in printed code, or one like it if it is taken.

    Returns:
        The node that has taken the place of `node`.
    """
    with node.graph.inserting_before(node):
        renamed = node.graph.create_node(node.op, node.target, node.args, node.kwargs, name, node.type)
    renamed.meta = dict(node.meta)
    node.replace_all_uses_with(renamed)
    node.graph.erase_node(node)
    return renamed


def _name_arguments(graph: Graph, none_args: Collection[str]) -> None:
    """Undo the tracer's renaming of specialised arguments: callers may pass them by name."""
    for node in list(graph.nodes):
        name = str(node.target).removesuffix("_1")
        if node.op == "placeholder" and name in none_args:
            node.target = name
            node.args = (None,)
            rename_node(node, name)
