"""The tensors that a model takes beside token ids where prompts have images: of several rows, joined into one batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from slipstream.records import Images


def form(images: Images | None) -> Hashable:
    """Rows of equal form can be computed together. None: a row without images.

    Models find out which features belong to which row in different ways where some rows have none, or rows have
    differently many. Joined along dimension 0 they are in the rows' order, which is all that equal shapes need.
    """
    if images is None:
        return None
    features = tuple(sorted((name, tuple(value.shape[1:]), value.dtype) for name, value in images.features.items()))
    return features, tuple(sorted(images.token_features))


def joined(rows: Sequence[Images | None], width: int, *, left: bool = False) -> dict[str, Tensor]:
    """The features of rows of equal form, on the CPU; {} where they have no images.

    Args:
        rows: Their images.
        width: Tokens of a row, which marks of tokens are extended to by zeros: completions and padding are text.
        left: Whether rows are padded on the left instead of the right.
    """
    given = [images for images in rows if images is not None]
    if not given:
        return {}
    made = {name: torch.cat([images.features[name] for images in given]) for name in given[0].features}
    for name, first in given[0].token_features.items():
        marks = made[name] = first.new_zeros(len(given), width)
        for row, images in zip(marks, given, strict=True):
            own = images.token_features[name][0]
            row[slice(-len(own), None) if left else slice(len(own))] = own
    return made
