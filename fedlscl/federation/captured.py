"""A fit on an NVIDIA GPU: a step is recorded once of each kind, as a CUDA graph, and repeated as a whole from then on.

A step of a small batch is a thousand short kernels, and it takes longer to start them one by one than to run them. What
`training_step` does is recorded: the forward and the backward pass, clipping, the optimizer's step, the sums of what is
logged. Of the same kind are the batches of a fit that are in the same phase and have the same shapes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from fedlscl.batches import Batch
from fedlscl.client import Client

log = logging.getLogger(__name__)

WORTH = 8
"""How many more steps a fit must have for one to be recorded, which costs about as much as one that is not."""

Replay = Callable[[], None]
Record = Callable[[Callable[[], object]], Replay]
"""Records what a function makes a device do, without its being done, and returns what has it done."""


class Recorded(NamedTuple):
    """A kind of step."""

    inputs: Mapping[str, Tensor]  # where the step reads its batch
    replay: Replay
    gradients: Sequence[Tensor | None]  # of all parameters, where the step leaves them
    optimizer_steps: int


class CapturingStrategy(SingleDeviceStrategy):
    """One device, on which the steps of a client's fit are recorded and repeated.

    A step is recorded once another of its kind has been trained on as always, whereby is made whatever is made once,
    and once a step of any kind in this fit, which makes the moments of the optimizer. Not recorded are fits of others
    than clients, those with a gradient scaler (16-mixed), those of clients that say why (`Client.uncapturable`), and
    those of a class with which it has failed, of which the log tells.

    Args:
        device: the GPU.
        record: how it is done.
    """

    known: ClassVar[set[Hashable]] = set()  # kinds of which there was one in this process
    refused: ClassVar[set[type[Client]]] = set()  # those with which recording has failed in this process

    def __init__(self, device: torch.device, record: Record) -> None:
        super().__init__(device=device)
        self._record = record
        self._begun = False
        self._recorded: dict[Hashable, Recorded] = {}
        self._last: Recorded | None = None

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """As the client does it; Lightning asks three hooks, which takes half as long as a short step."""
        if isinstance(batch, Batch) and isinstance(client := self.lightning_module, Client):
            return client.transfer_batch_to_device(batch, self.root_device, dataloader_idx)
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train on a batch."""
        client = self.lightning_module
        scaled = getattr(self.precision_plugin, "scaler", None) is not None
        if not isinstance(client, Client) or client.uncapturable or scaled or type(client) in self.refused:
            return super().training_step(*args, **kwargs)
        batch, number = args
        assert isinstance(batch, Batch)
        tensors = batch.tensors()
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        kind = type(client), self.precision_plugin.precision, batch.phase, shapes
        left = client.trainer.num_training_batches - number
        if kind not in self._recorded and self._begun and left > WORTH and kind in self.known:
            self._try(client, kind, batch.phase, tensors)
        if (step := self._recorded.get(kind)) is None:
            self._last, self._begun = None, True
            self.known.add(kind)
            return super().training_step(*args, **kwargs)
        for name, tensor in tensors.items():
            step.inputs[name].copy_(tensor, non_blocking=True)
        step.replay()
        if step is not self._last:
            self._last = step
            for parameter, gradient in zip(client.parameters(), step.gradients, strict=True):
                parameter.grad = gradient
        progress = _progress(client)
        for _ in range(step.optimizer_steps):
            progress.increment_ready()
            progress.increment_completed()
        return None

    def _try(self, client: Client, kind: Hashable, phase: str, tensors: Mapping[str, Tensor]) -> None:
        """Record a step on a batch like this."""
        inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        batch, progress = Batch.of(phase, inputs), _progress(client)
        before = copy.deepcopy((progress.total, progress.current))
        moved = [set(optimizer.state) for optimizer in self.optimizers]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["capturable"] = True  # torch asks for the word; a fused step's numbers do not depend on it
        try:
            with _no_logging(client):
                replay = self._record(lambda: super(CapturingStrategy, self).training_step(batch, 0))
        except Exception as error:  # whatever a device refuses to record, or a method does that is not for it
            self.refused.add(type(client))
            self._recorded.clear()
            log.warning(
                "the training step of %s cannot be recorded, so that a GPU waits for it more than it need (%s: %s)",
                type(client).__name__,
                type(error).__name__,
                str(error).partition("\n")[0],
            )
            return
        finally:  # nothing has been done yet
            steps = progress.total.completed - before[0].completed
            progress.total, progress.current = before
        first = [state.keys() - known for state, known in zip((o.state for o in self.optimizers), moved, strict=True)]
        if any(first):  # it moves what no step has moved before: their moments would begin anew with each repetition
            for optimizer, parameters in zip(self.optimizers, first, strict=True):
                for parameter in parameters:
                    del optimizer.state[parameter]
            self.known.discard(kind)
            return
        self._recorded[kind] = Recorded(inputs, replay, [parameter.grad for parameter in client.parameters()], steps)

    def teardown(self) -> None:
        """Let go of what a fit or test leaves on the device; the client's networks go to the CPU, as Lightning has it.

        Lightning would also copy the moments of the optimizer, which end here, and give the device's memory back, which
        the next fit asks for a moment later.
        """
        self._recorded.clear()
        self._last = None
        self.optimizers = []
        if self.lightning_module is not None:
            self.lightning_module.zero_grad()
            self.lightning_module.cpu()
        self.precision_plugin.teardown()
        self.checkpoint_io.teardown()


def _progress(client: Client) -> Any:
    """Lightning's count of the optimizer's steps, which makes `Trainer.global_step`."""
    return client.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress


@contextmanager
def _no_logging(client: Client) -> Iterator[None]:
    """Inside, `log` and `log_dict` raise: Lightning would note the value of one batch for all."""

    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("it calls log or log_dict, whose place `tally` takes in a training step")

    names = ("log", "log_dict")
    client.__dict__.update(dict.fromkeys(names, refuse))
    try:
        yield
    finally:
        for name in names:
            del client.__dict__[name]


def cuda_graph(step: Callable[[], object]) -> Replay:
    """Record what a function makes the current CUDA device do."""
    stream, pool, _ = _place()
    return _graph(step, stream, pool).replay


@cache
def _place() -> tuple[torch.cuda.Stream, Any, torch.cuda.CUDAGraph]:
    """A stream to record on, and the memory that all graphs share, which lasts as long as one of them: the third."""
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
    return stream, pool, _graph(lambda: torch.zeros(1, device="cuda"), stream, pool)


def _graph(step: Callable[[], object], stream: torch.cuda.Stream, pool: Any) -> torch.cuda.CUDAGraph:
    # not by torch.cuda.graph, which also waits for the device and gives all its memory back
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
    drawn = generator.clone_state()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            with suppress(RuntimeError):  # the first error says more
                graph.capture_end()
            generator.graphsafe_set_state(drawn)  # the other one goes on waiting for the end
            _place.cache_clear()  # and so does this memory
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
