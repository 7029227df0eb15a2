"""`model.runtime`: adapting a compiled model to new data, in place, while it serves."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from moe_compiler.kernels.forward_lock import ForwardLock
from moe_compiler.kernels.pool import ChannelPool
from moe_compiler.passes.base import NoProgress, Progress
from moe_compiler.passes.calibrate import Dataset
from moe_compiler.passes.record import plain_block, record_blocks
from moe_compiler.passes.shadow import shadow
from moe_compiler.runtime.adaptation import RuntimeLayer, check_rule, choose_layer
from moe_compiler.runtime.attach import attached_masters
from moe_compiler.runtime.checkpoint import Checkpoint
from moe_compiler.runtime.guard import WINDOW_TOKENS, Action, DriftPolicy, DriftReport, divergences
from moe_compiler.runtime.master import DetachedMaster, LinearMaster
from moe_compiler.runtime.observation import observe_layers
from moe_compiler.runtime.pools import ModelPools
from moe_compiler.runtime.profile import Linear, Profile, check_contents, check_name, moved, read_profile, write_profile
from moe_compiler.runtime.report import AdaptReport, LayerChange, jensen_shannon
from moe_compiler.runtime.serving import DriftWatch, EndsForward, HeldGenerate, logger

CALIBRATION = "calibration"
TIMEOUT_SECONDS = 60.0


class Runtime:
    """Adapts a compiled model to new data, keeps what it learned as profiles, and watches for data that change.

    All that changes is the contents of the channel pools' buffers; shapes, dtypes, strides and addresses stay, so a
    compiled graph of the model keeps running and follows the change without a recompilation.

    Every change is atomic. A forward pass sees all of one profile: it holds a lock from its first packed operator to
    its last, and a change waits for the passes under way, at most `timeout` seconds. All of a `generate` sees one
    profile; for anything longer there is `hold`. Many threads may run the model and change it.

    Attributes:
        layers: what is known of each lowered MoE block, by path.
        active: the name of the profile in the pools: `"calibration"` after compiling.
        base_model: where the model came from before it was compiled, a folder or a repository of the hub; empty if
            that is not known.
        base_revision: the repository's commit, where that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, RuntimeLayer],
        *,
        rule: str,
        widths: Sequence[int],
        tokens_per_batch: int,
        load: Callable[..., Dataset],
        progress: Progress | None = None,
        base_model: str = "",
        base_revision: str | None = None,
    ) -> None:
        self.model = model
        self.base_model = base_model
        self.base_revision = base_revision
        self.layers = dict(layers)
        self.rule = rule
        self.widths = tuple(widths)
        self.tokens_per_batch = tokens_per_batch
        self.active = CALIBRATION
        self._load = load
        self._progress = progress or NoProgress()
        self._lock = ForwardLock.new()
        self._pools = ModelPools(self.layers, self._lock)
        self._policy: DriftPolicy | None = None
        self._alarm: tuple[str, str | None] | None = None
        self._alarm_lock = threading.Lock()
        self._watch: DriftWatch | None = None
        counts = {path: layer.calibration_count.double().cpu() for path, layer in self.layers.items()}
        self._profiles = {CALIBRATION: Profile(CALIBRATION, rule, 0, self._pools.contents(), counts)}
        record_blocks(
            [layer.block for layer in self.layers.values()], lock=self._lock.number, decay=1 - 1 / WINDOW_TOKENS
        )
        EndsForward(self._lock).register(model, self.layers)
        if hasattr(model, "generate"):
            model.generate = HeldGenerate(model)  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_alarm_lock": None, "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_alarm_lock": threading.Lock()})

    @property
    def profiles(self) -> Mapping[str, Profile]:
        """The known profiles by name: a view that cannot be written."""
        return MappingProxyType(self._profiles)

    @torch.no_grad()
    def adapt(
        self,
        samples: Any,
        *,
        rule: str | None = None,
        name: str = "adapted",
        tokenizer: Any = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> AdaptReport:
        """Fills the channel pools for new data, in place, and keeps the contents as a profile.

        The samples run through the quantized model (through a second model object over the same tensors, so the
        serving model and what was compiled from it are not touched); the new contents are computed aside and checked,
        and only then copied into the pools. If anything fails, the pools and the profiles stay as they were.

        Args:
            samples: the new data: texts, token ids or a `datasets.Dataset`, a few thousand tokens.
            rule: one of `moe_compiler.runtime.rules.RULES`, which says what each does, needs and costs. The default was
                chosen at compile time. The rule `"cluster"` may leave a larger error than it found, which the report
                shows.
            name: what to call the profile; a profile of that name is replaced.
            tokenizer: needed where `samples` is text and none was given to `dynamo_compile`.
            timeout: how long to wait for running forward passes, or for another thread's change, in seconds.

        Returns:
            What changed, per layer, and the time of each step.

        Raises:
            ValueError: unknown rule, or one that the model was not compiled for, bad name or `timeout`, or bad samples
                (see `moe_compiler.data.load_samples`).
            FloatingPointError: activations or new contents were not finite.
            RuntimeError: forward passes did not end in time, or this thread is inside `hold`; or the model was loaded
                from files and the model that it was compiled from is not where it was: see `attach_master`.
        """
        rule = self.rule if rule is None else rule
        if self.is_detached:
            self._find_master()
        check_rule(rule, self.layers)
        self._check_new(name)
        with self._changing(timeout):
            dataset = self._load(samples, name=name, tokenizer=tokenizer)
            return self._adapt(dataset, rule, name, timeout)

    def switch(self, name: str, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Puts a known profile into the pools: a few device copies.

        Args:
            name: the profile.
            timeout: how long to wait for running forward passes, or for another thread's change, in seconds.

        Raises:
            ValueError: there is no such profile, or `timeout` is bad.
            RuntimeError: forward passes did not end in time, or this thread is inside `hold`. Nothing was changed.
        """
        with self._changing(timeout):
            self._swap(self._known(name), timeout)

    def revert(self, *, timeout: float = TIMEOUT_SECONDS) -> None:
        """Puts the contents back that the pools had when the model was compiled, bit for bit."""
        self.switch(CALIBRATION, timeout=timeout)

    def save(self, name: str, path: str | os.PathLike[str]) -> None:
        """Writes a profile to a file, which `load` reads into the same compilation of the same model.

        Args:
            name: the profile.
            path: the file, replaced whole or not at all.

        Raises:
            ValueError: there is no such profile.
            OSError: the file could not be written; whatever it held before is still there.
        """
        write_profile(self._known(name), _path(path), self._pools.fingerprint())

    def load(self, path: str | os.PathLike[str], name: str | None = None) -> Profile:
        """Reads a profile from a file and adds it to the known ones; `switch` puts it into the pools.

        Args:
            path: what `save` wrote.
            name: what to call it; as when it was saved if `None`.

        Returns:
            The profile.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no profile, was cut or changed, is of another version or belongs to another model; or its
                name is taken.
        """
        if name is not None:
            self._check_new(name)
        profile = read_profile(_path(path), self._pools.packed(), self._pools.fingerprint, name)
        with self._changing(TIMEOUT_SECONDS):
            if profile.name in self._profiles:
                raise ValueError(
                    f"`name` must be new, but there is a profile {profile.name!r}: give another or `remove` that one"
                )
            self._profiles[profile.name] = profile
        return profile

    @property
    def is_detached(self) -> bool:
        """Whether original weights are missing, as after loading a saved model, until `adapt` or `attach_master`."""
        masters = (one for layer in self.layers.values() for one in layer.masters.values())
        return any(isinstance(one, DetachedMaster) for one in masters)

    def attach_master(self, source: str | os.PathLike[str], *, revision: str | None = None) -> None:
        """Says where the original weights are, which `adapt` needs; reads all experts' weights once, to check them.

        A saved model has no original weights. `adapt` looks for them where they were when the model was compiled; this
        is for when they are elsewhere now.

        Args:
            source: the folder of the model that was compiled, or its name on the hub, in the local cache.
            revision: a branch or commit of the hub's repository.

        Raises:
            ValueError: there are no safetensors files, or they are of another model. Nothing has been changed then.
            RuntimeError: a file cannot be read, or another thread's change did not end in time.
        """
        if not isinstance(source, str | os.PathLike) or not os.fspath(source):
            raise ValueError(f"`source` must be a model's folder or its name on the hub, but is {source!r}")
        self._attach(attached_masters(self.layers, Checkpoint.named(os.fsdecode(source), revision)))

    def restore(self, profiles: Iterable[Profile], active: str) -> None:
        """Takes over the profiles of a saved model, whose pools hold the one called `active`.

        Raises:
            ValueError: none is called `active`, or none is the one that compiling made.
        """
        known = {profile.name: profile for profile in profiles}
        for name in (CALIBRATION, active):
            if name not in known:
                raise ValueError(f"`profiles` must have one called {name!r}, but has {', '.join(map(repr, known))}")
        self._profiles, self.active = known, active

    @property
    def fingerprint(self) -> str:
        """A hash over what never changes of the compiled experts; see `moe_compiler.runtime.profile.fingerprint`."""
        return self._pools.fingerprint()

    def _find_master(self) -> None:
        try:
            if not self.base_model:
                raise ValueError("it is not known which model this one was compiled from")
            masters = attached_masters(self.layers, Checkpoint.named(self.base_model, self.base_revision))
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(
                "`adapt` needs the original weights, which a saved model does not hold: call "
                f"`model.runtime.attach_master` with the folder or the hub's name of the model it was compiled from, "
                f"{self.base_model or 'of unknown name'} ({error})"
            ) from error
        self._attach(masters)

    def _attach(self, masters: Mapping[str, Mapping[str, LinearMaster]]) -> None:
        with self._changing(TIMEOUT_SECONDS):
            for path, found in masters.items():
                self.layers[path] = replace(self.layers[path], masters=found)

    def remove(self, name: str) -> None:
        """Forgets a profile.

        Raises:
            ValueError: there is no such profile, or it is in the pools, or the one that compiling made.
        """
        with self._changing(TIMEOUT_SECONDS):
            self._known(name)
            if name in (CALIBRATION, self.active):
                kind = "what compiling made" if name == CALIBRATION else "in the pools: switch to another first"
                raise ValueError(f"profile {name!r} cannot be removed, it is {kind}")
            del self._profiles[name]

    def hold(self) -> AbstractContextManager[None]:
        """A context in which nothing changes: every forward pass of this thread sees one profile.

        Changes by other threads wait for its end; changes by this thread raise. `generate` holds by itself.
        """
        return self._lock.hold()

    def drift(self) -> DriftReport:
        """How far the routing of the last tokens is from that of each profile. Reads the histograms, changes nothing.

        The histograms count every token that a forward pass of the model routes, with an age limit of about
        `moe_compiler.runtime.guard.WINDOW_TOKENS`; what `adapt` observes does not count, and every change of the
        profile starts them anew.
        """
        profiles = {name: profile.histograms for name, profile in list(self._profiles.items())}
        return DriftReport(self.active, divergences(self._pools.histograms(), profiles))

    def on_drift(
        self,
        policy: Action | None,
        *,
        margin: float = DriftPolicy.margin,
        threshold: float | None = DriftPolicy.threshold,
        minimum_tokens: int = DriftPolicy.minimum_tokens,
        timeout: float = DriftPolicy.timeout,
        every: float | None = None,
    ) -> None:
        """Says what to do when the data change. Looks after every `generate`, at every call of `check`, and on request
        from a background thread; never inside a forward pass, so nothing of it is in a compiled graph.

        Args:
            policy: `"report"`: log a warning; `"switch"`: put the nearest profile into the pools; a callable is given
                the `DriftReport`; `None`: do nothing from now on. `"report"` and the callable act once per change.
            margin: how much nearer, in bits, another profile must be than the active one.
            threshold: also act where the active profile is farther than that, in bits, though no other is nearer: data
                that no profile knows. Not for `"switch"`.
            minimum_tokens: how many tokens must have been seen since the profile last changed.
            timeout: how long a switch waits for running forward passes, in seconds; the next look tries again.
            every: also look at such intervals, in seconds: for servers that do not call `generate`.

        Raises:
            ValueError: a number is out of range, or `policy` is none of these.
        """
        new = None if policy is None else DriftPolicy(policy, margin, threshold, minimum_tokens, timeout)
        if every is not None and not (isinstance(every, int | float) and 0 < every <= threading.TIMEOUT_MAX):
            raise ValueError(f"`every` must be a positive number of seconds, but is {every!r}")
        if self._watch is not None:
            self._watch.stop()
        self._policy, self._alarm = new, None
        self._watch = None if new is None or every is None else DriftWatch(self, every)

    def check(self) -> DriftReport:
        """Looks for drift now and does what `on_drift` said.

        Returns:
            What it saw; `drifted` and `switched_to` say what it made of it.

        Raises:
            RuntimeError: a switch was due, but forward passes did not end in time, or this thread is inside `hold`.
        """
        report, policy = self.drift(), self._policy
        if policy is None:
            return report
        if policy.action == "switch":
            return self._follow(report, policy)
        with self._alarm_lock:
            if not policy.drifted(report, margin=0.5 if self._alarm else 1.0):
                self._alarm = None
                return report
            alarm = (report.active, report.nearest)
            known, self._alarm = self._alarm == alarm, alarm
        report = replace(report, drifted=True)
        if known:
            return report
        if policy.action == "report":
            logger.warning("%s", report)
        else:
            policy.action(report)
        return report

    def _follow(self, report: DriftReport, policy: DriftPolicy) -> DriftReport:
        """Switches to the nearest profile if the policy says so, by what the histograms say then."""
        if not policy.drifted(report):
            return report
        with self._changing(policy.timeout):
            report = self.drift()
            if not policy.drifted(report) or report.nearest is None:
                return report
            self._swap(self._known(report.nearest), policy.timeout)
        logger.info("switched to the profile %r: %s", report.nearest, report)
        return replace(report, drifted=True, switched_to=report.nearest)

    def _adapt(self, dataset: Dataset, rule: str, name: str, timeout: float) -> AdaptReport:
        start = time.perf_counter()
        active = self._profiles[self.active]
        plain = {path: replace(layer, block=plain_block(layer.block)) for path, layer in self.layers.items()}
        observed = observe_layers(
            shadow(self.model, {path: layer.block.graph for path, layer in plain.items()}),
            plain,
            dataset,
            rule,
            name=name,
            tokens_per_batch=self.tokens_per_batch,
            progress=self._progress,
        )
        pools: dict[Linear, ChannelPool] = {}
        histograms: dict[str, Tensor] = {}
        changes: list[LayerChange] = []
        choosing = 0.0
        for number, (path, statistics, moments) in enumerate(observed, 1):
            begun = time.perf_counter()
            layer = self.layers[path]
            with self._progress.task(f"filling pools, layer {number} of {len(self.layers)}", 1) as advance:
                contents, change = choose_layer(layer, statistics, rule, name, self.widths, moments)
                for linear, pool in contents.items():
                    packed = layer.experts.packed(linear)
                    check_contents(pool, packed, f"new contents of `{linear}` in `{path}`")
                    pools[path, linear] = moved(pool, packed.pool.offset.device)
                advance()
            histograms[path] = statistics.count.double().cpu()
            divergence = jensen_shannon(histograms[path], active.histograms[path])
            changes.append(replace(change, divergence=float(divergence)))
            choosing += time.perf_counter() - begun
        chosen = time.perf_counter()
        tokens = sum(sample.numel() for sample in dataset)
        profile = Profile(name, rule, tokens, pools, histograms)
        self._swap(profile, timeout)
        return AdaptReport(
            name=name,
            previous=active.name,
            rule=rule,
            tokens=tokens,
            layers=tuple(changes),
            seconds={
                "observe": chosen - start - choosing,
                "choose": choosing,
                "swap": time.perf_counter() - chosen,
            },
        )

    def _swap(self, profile: Profile, timeout: float) -> None:
        self._pools.swap(profile.pools, timeout)
        self._profiles[profile.name] = profile
        self.active = profile.name

    @contextmanager
    def _changing(self, timeout: float) -> Iterator[None]:
        if (
            isinstance(timeout, bool)
            or not isinstance(timeout, int | float)
            or not 0 <= timeout <= threading.TIMEOUT_MAX
        ):
            raise ValueError(f"`timeout` must be a number of seconds, 0 or more, but is {timeout!r}")
        with self._lock.changing(timeout):
            yield

    def _known(self, name: str) -> Profile:
        profile = self._profiles.get(name) if isinstance(name, str) else None
        if profile is None:
            known = ", ".join(map(repr, self._profiles))
            raise ValueError(f"`name` must be one of the profiles {known}, but is {name!r}")
        return profile

    def _check_new(self, name: str) -> None:
        check_name(name)
        if name == CALIBRATION:
            raise ValueError(f"`name` must not be {CALIBRATION!r}, the profile that compiling made")


def _path(path: str | os.PathLike[str]) -> str:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"`path` must be the path of a file, but is {path!r}")
    return os.fsdecode(path)
