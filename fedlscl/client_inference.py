"""A client that answers: what its networks say of images where nothing is trained, and its test.

Shapes: B batch, K classes of the whole federation, n images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedlscl.batches import Augmented, ImageBatches, Images, Output
from fedlscl.client_model import ClientModel
from fedlscl.data.source import Part
from fedlscl.evaluation import MaskedAccuracy


class InferenceClient(ClientModel):
    """Forward passes with what the cache knows, and the accuracy under every mask."""

    # the masks under which a test image is classified with parameters that the task it belongs to has chosen
    task_aware: ClassVar[tuple[str, ...]] = ()
    evaluation_batch_size: int
    seen_mask: Tensor  # (K,) true for all classes of this client up to the current task
    accuracy: MaskedAccuracy

    def output(self, images: Images, part: Part = "train") -> Output:
        """The forward pass on images of one part, with what the cache knows of them."""
        output: Output = self(images.pixels, self.frozen(images, part))
        return output

    def frozen(self, images: Images, part: Part = "train") -> Mapping[str, Tensor]:
        """What `precompute` gives for images of one part: from the cache, or computed now for augmented ones."""
        if images.frozen is not None:
            return images.frozen
        if not isinstance(images, Augmented):
            return self.precomputed(part, images.indices, self.device)
        with torch.no_grad():
            return self.precompute(images.pixels)

    def observe(
        self, indices: Tensor, compute: Callable[[Images], Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """What the model gives for training images (n,): evaluation mode, float32, on the CPU.

        Args:
            indices: which images.
            compute: what is wanted of a batch, (B, ...) each by name; by default `logits` and `representation`.

        Returns:
            (n, ...) each by name.
        """
        self.eval()
        parts = []
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for images in ImageBatches(self.data, "train", indices, self.evaluation_batch_size, self.device):
                if compute is not None:
                    parts.append(compute(images))
                else:
                    logits, representation, _ = self.output(images)
                    parts.append({"logits": logits, "representation": representation})
        self._merged = ()
        return {name: torch.cat([part[name] for part in parts]).float().cpu() for name in parts[0]}

    # ---- the test

    def begin_evaluation(self, task: int) -> None:
        """Get ready for `Trainer.test` on the test images of tasks 1 to `task`."""
        self.test_images = self.data.test_images(task)
        masks = torch.stack([self.data.class_mask(n, n + 1) for n in range(task)])
        self.accuracy = MaskedAccuracy(masks, self.data.federation_mask(task))
        self.seen_mask = self.data.class_mask(0, task)

    def test_dataloader(self) -> ImageBatches:
        """Test images of all tasks up to the one that evaluation began with."""
        part, size = self.data.evaluate_on, self.evaluation_batch_size
        return ImageBatches(self.data, part, self.test_images, size, self.device)

    def on_test_start(self) -> None:
        """Put everything where the client is."""
        self.follow()
        self.eval()

    def on_test_end(self) -> None:
        """Free the memory of what was made for the test alone."""
        self._merged = ()

    def test_step(self, batch: Images, batch_idx: int) -> None:
        """Count the hits."""
        self.accuracy.update(self.test_logits(batch, self.accuracy.task_of_class[batch.labels]), batch.labels)

    def test_logits(self, batch: Images, tasks: Tensor) -> Tensor:
        """Logits (B, K) for test images.

        Args:
            batch: the images.
            tasks: (B,) number of the task that each image's class belongs to, from 0. What follows from it must not
                count under a mask that is not in `task_aware`.
        """
        return self.output(batch, self.data.evaluate_on).logits
