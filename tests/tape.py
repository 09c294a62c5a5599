"""What a CUDA graph is on a CPU: a training step that is done again as it was recorded, and looked at each time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedlscl.federation import captured, trainer
from fedlscl.federation.captured import CapturingStrategy

aten = torch.ops.aten
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal", "bincount"}
"""Operations with which a GPU is waited for, since the program goes on with a number or a size that it finds."""


class Trace(TorchDispatchMode):
    """Writes down each operation: its name, its numbers, and where its tensors come from."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []
        self.made: dict[int, int] = {}  # by the place in memory, the operation that made it
        self.alive: list[Tensor] = []  # so that no place is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        line: list[Any] = [func._schema.name.partition("::")[2]]
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                place = leaf.untyped_storage().data_ptr()
                line.append((self.made.get(place, f"at {place}"), tuple(leaf.shape), leaf.dtype))
                if line[0] == "index" and leaf.dtype == torch.bool:
                    line[0] = "nonzero"
            elif isinstance(leaf, torch.Generator):
                line[0] = "a generator of its own"
            else:
                line.append(repr(leaf))
        found = func(*args, **kwargs)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.made.setdefault(leaf.untyped_storage().data_ptr(), len(self.lines))
                self.alive.append(leaf)
        if not line[0].startswith("_record_function"):  # of the profiler
            self.lines.append(tuple(line))
        return found


class Tape:
    """Records training steps as `cuda_graph` does, for the strategies that it makes.

    Each repetition does again what Python does, and is compared with the first: other numbers, other tensors or a
    wait would be lost on a GPU.
    """

    def __init__(self) -> None:
        self.kinds = 0
        self.replays = 0
        self.differences: list[str] = []

    def strategy(self, *_: Any) -> CapturingStrategy:
        made: CapturingStrategy = CapturingStrategy(torch.device("cpu"), lambda step: self.record(made, step))
        return made

    def record(self, strategy: CapturingStrategy, step: Callable[[], object]) -> Callable[[], None]:
        client: Any = strategy.lightning_module
        tensors = [*client.state_dict().values(), client._tallies]
        tensors += [x for o in strategy.optimizers for s in o.state.values() for x in s.values()]
        before, drawn = [copy.deepcopy(x) for x in tensors], torch.get_rng_state()
        try:
            step()  # for the gradients, which are somewhere from now on; the rest is put back
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
            torch.set_rng_state(drawn)
        gradients = [parameter.grad for parameter in client.parameters()]
        traces: list[Trace] = []
        self.kinds += 1

        def replay() -> None:
            self.replays += 1
            progress = captured._progress(client)
            counted = copy.deepcopy((progress.total, progress.current))
            with Trace() as trace:
                step()
            progress.total, progress.current = counted  # Python does nothing in a graph
            traces.append(trace)
            self.compare(traces[0], trace)
            for parameter, kept in zip(client.parameters(), gradients, strict=True):
                if kept is not None:
                    kept.copy_(parameter.grad)
                parameter.grad = kept

        return replay

    def compare(self, first: Trace, trace: Trace) -> None:
        waits = [line[0] for line in trace.lines if line[0] in WAITS or line[0].startswith("a generator")]
        self.differences += waits
        if len(first.lines) != len(trace.lines):
            self.differences.append(f"{len(first.lines)} operations, then {len(trace.lines)}")
        different = (pair for pair in zip(first.lines, trace.lines, strict=False) if pair[0] != pair[1])
        self.differences += [f"{one}, then {other}" for one, other in list(different)[:1]]


@contextmanager
def recording() -> Iterator[Tape]:
    """Inside, Trainers record and repeat the steps of clients, even in short fits."""
    tape = Tape()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_strategy", tape.strategy)
        patch.setattr(captured, "WORTH", 0)
        patch.setattr(CapturingStrategy, "known", set())
        patch.setattr(CapturingStrategy, "refused", set())
        yield tape
