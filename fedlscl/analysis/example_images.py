"""Example images with predictions, as a section of the report: of the runs whose data and models are there."""

from __future__ import annotations

import base64
import io
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedlscl.analysis.captions import ranking
from fedlscl.analysis.comparison import Comparison
from fedlscl.analysis.sections import Section, drawn, folder_of

log = logging.getLogger(__name__)

MASK = "seen"
RUNS = 2
"""Of how many methods, the best ones, images are shown."""

SIDE = 96
"""Pixels of an image on the page, at most."""


def examples_section(comparison: Comparison, key: str, count: int) -> Section | None:
    """So many images of each of some clients of the best methods; None where no run can be asked.

    Args:
        comparison: the runs; those that cannot be asked are named in the log.
        key: the id of the section's heading.
        count: how many images of each client.
    """
    from fedlscl.run.examples import examples  # and with it all that trains

    shown: list[dict[str, Any]] = []
    for variant in ranking(comparison.usual, MASK)[:RUNS]:
        run = variant.runs[0]
        if (folder := folder_of(run)) is None:
            log.warning("%s: no example images, which take the whole folder of a run", run.path)
            continue
        try:
            asked = examples(folder, count)
        except (ValueError, OSError) as error:
            log.warning("%s: no example images, for %s", folder, error)
            continue
        clients = [
            {
                "index": each.client,
                "right": each.right,
                "looked_at": each.looked_at,
                "images": [
                    {"truth": image.truth, "right": image.right, "best": image.best, "png": _png(image.pixels)}
                    for image in each.images
                ],
            }
            for each in asked
        ]
        shown.append({"name": variant.label, "seed": run.seed, "clients": clients})
    if not shown:
        return None
    return Section(key, "Example images", drawn("examples", shown=[[*each.values()] for each in shown]))


def _png(pixels: NDArray[np.uint8]) -> str:
    """An image (3, H, W) as a PNG in base64."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    image.save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()
