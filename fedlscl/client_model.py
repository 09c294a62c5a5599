"""What a client is before it learns anything: its networks, what of them travels, and the state that must survive.

Shapes: B batch, K classes of the whole federation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from fedlscl import seeds
from fedlscl.batches import Output
from fedlscl.data.local import LocalData
from fedlscl.data.module import FederatedDataModule
from fedlscl.data.splits import Split
from fedlscl.memory import Memory, above, below
from fedlscl.messages import Download, Schema, schema_of
from fedlscl.models.adapters import Injection, LowRank
from fedlscl.models.cache import Lookup
from fedlscl.models.cnn import SmallModelSpec
from fedlscl.models.vit import FrozenViT


class ClientModel(LightningModule, ABC):
    """The networks of a client, its messages and its state.

    The object that a configuration builds holds settings only; `assemble` gives it networks, and `restore` makes it one
    client or another, so that one object serves all clients in turn.
    """

    # the training images that show in an upload: of the `task`, in the `buffer`, or all, by what a `model` has learned
    discloses: ClassVar[Literal["model", "task", "buffer"]] = "model"

    vit: FrozenViT
    precomputed: Lookup
    index: int  # which client this is
    data: LocalData  # what this client sees
    memory: Memory
    _merged: tuple[Any, ...] = ()  # what `lora_features` made of the ViT; the tuple keeps it out of the module tree

    # ---- the networks

    @abstractmethod
    def build(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> None:
        """Create, or create anew, the networks that are trained, as submodules."""

    @abstractmethod
    def forward(self, images: Tensor, frozen: Mapping[str, Tensor]) -> Output:
        """Outputs for uint8 images (B, 3, H, W), given what `precompute` returned for them."""

    def check(self, split: Split) -> None:
        """Raise ValueError, before any training, if the method cannot work with this split."""

    def precompute(self, images: Tensor) -> dict[str, Tensor]:
        """What of `forward` depends on nothing trained, (B, ...) each by name: computed once per image."""
        return {}

    def lora_features(
        self,
        tokens: Tensor,
        block: int,
        pairs: Callable[[], Sequence[LowRank]],
        injections: Sequence[Injection] = (),
    ) -> Tensor:
        """Features (B, d) from the tokens (B, T, d) that enter `block`, of the ViT with LoRA and other injections.

        In evaluation mode and without gradients the pairs, each of which must be for all samples, are merged into
        copies of the weights: at the first call, for all up to the next `train`, `eval` or `load`.
        """
        if self.training or torch.is_grad_enabled():
            return self.vit.upper(tokens, block, [*pairs(), *injections])
        if not self._merged:
            self._merged = (self.vit.merged(pairs()),)
        return self.vit.upper(tokens, block, injections, *self._merged)

    def train(self, mode: bool = True) -> Self:
        """Change the mode, and forget what was merged before."""
        self._merged = ()
        return super().train(mode)

    # ---- messages

    def shared(self) -> dict[str, Tensor]:
        """The live tensors with which all clients start alike, and which then travel, by name; none by default."""
        return {}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Make these the shared tensors."""
        shared = self.shared()
        with torch.no_grad():
            for name, tensor in tensors.items():
                shared[name].copy_(tensor)

    def outgoing(self) -> dict[str, Tensor]:
        """The tensors of an upload; the shared ones by default."""
        return self.shared()

    def upload_schema(self) -> Schema:
        """What an upload must look like."""
        return schema_of(self.shared())

    def disclosed(self, images: Tensor) -> Tensor | None:
        """The features (B, e) of uint8 images (B, 3, H, W) whose rows or sums an upload holds; None if it has none.

        For `fedlscl audit`, which then attacks them; `discloses` says which images' features these are.
        """
        return None

    def download(self, message: Download) -> None:
        """Take over what the server answered: new values of the shared tensors by default."""
        self.adopt(message.tensors)

    def download_schema(self) -> Schema:
        """What a download must look like."""
        return schema_of(self.shared())

    def on_download_end(self) -> None:
        """Compute what follows from an answer before the model is used: in evaluation mode and on its device.

        `observe` may be called here, for a forward pass on training images.
        """

    # ---- identity and state

    def assemble(self, vit: FrozenViT, cnn: SmallModelSpec, cnn_name: str, num_classes: int) -> Self:
        """Build the networks. The ViT stays outside the module tree: it is shared, frozen and part of no state."""
        self.__dict__["vit"] = vit
        self.num_classes = num_classes
        self._parts = (vit, cnn, cnn_name, num_classes)
        self.build(*self._parts)
        self.memory = Memory()
        return self

    def initial_state(self, seed: int) -> dict[str, Tensor]:
        """The state of a client that has learned nothing, its networks initialised from `seed`."""
        with seeds.seeded(seed):
            self.build(*self._parts)
        self.memory = Memory()
        return self.state()

    def state(self) -> dict[str, Tensor]:
        """Everything of this client that must survive a round, as named tensors on the CPU."""
        model = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        return above(model, "model.") | above(self.memory.to_tensors(), "memory.")

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over networks and memory from what `state` returned."""
        self._merged = ()
        self.load_state_dict(below(state, "model."))
        self.memory = Memory.from_tensors(below(state, "memory."))

    def see(self, data: FederatedDataModule, index: int) -> LocalData:
        """What client `index` sees of the data; its own tasks by default."""
        return LocalData(data, index)

    def restore(self, index: int, data: FederatedDataModule, precomputed: Lookup, state: Mapping[str, Tensor]) -> None:
        """Become client `index` in the state that `state` returned for it."""
        self.index, self.data, self.precomputed = index, self.see(data, index), precomputed
        self.load(state)

    def follow(self) -> None:
        """Put what is no part of the module, frozen model and archive, on the device where the client is."""
        self.vit.move_to(self.device)
        self.memory.archive.to(self.device)
