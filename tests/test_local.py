"""What one client sees of the data."""

from __future__ import annotations

import numpy as np
import torch

from fedlscl.data.local import LocalData
from fedlscl.data.module import FederatedDataModule


def test_a_client_sees_its_own_tasks(data: FederatedDataModule) -> None:
    for index, client in enumerate(data.split.clients):
        local, (first, second) = LocalData(data, index), client.tasks
        assert local.tasks == client.tasks
        assert local.class_mask(0, 1).nonzero().flatten().tolist() == sorted(first.classes)
        assert local.class_mask(1, 2).nonzero().flatten().tolist() == sorted(second.classes)
        assert torch.equal(local.class_mask(0, 2), local.class_mask(0, 1) | local.class_mask(1, 2))
        assert not local.class_mask(1, 1).any()
        assert local.train_images(0, 2).tolist() == [*first.train, *second.train]
        assert local.train_images(1, 2).tolist() == [*second.train]
        assert local.train_images(2, 2).shape == (0,)
        assert local.test_images(1).tolist() == [*first.test]
        assert local.test_images(2).tolist() == [*first.test, *second.test]


def test_labels_and_images_are_those_of_the_data(data: FederatedDataModule) -> None:
    local = LocalData(data, 1)
    indices = local.train_images(0, 2).flip(0)
    images, labels = local.batch("train", indices)
    assert torch.equal(local.labels(indices), labels)
    np.testing.assert_array_equal(images.numpy(), data.dataset.train.images[indices.numpy()])
    assert set(labels.tolist()) == {label for task in local.tasks for label in task.classes}


def test_nothing_leads_to_what_others_have(data: FederatedDataModule) -> None:
    """Everything public is of this client, or by index, but for the classes of all together."""
    local = LocalData(data, 0)
    public = {name for name in dir(local) if not name.startswith("_")}
    wanted = {"tasks", "num_classes", "evaluate_on", "class_mask", "train_images", "test_images", "labels", "batch"}
    wanted |= {"federation_mask"}
    assert public == wanted
