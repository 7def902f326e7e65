"""Projected features become image tokens: order of crops, pooling, newlines, pruning (DivPrune)."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, normalize

from ..image_layout import ImageTokenLayout


def arrange_features(
    features: Tensor, layout: ImageTokenLayout, newline: Tensor | None = None
) -> Tensor:
    """Features of an image's crops `[crops, grid * grid, D]` in the order of its tokens,
    `[layout.length, D]`.

    newline: the parameter `image_newline [D]`, where the layout has newlines.
    """
    assert features.shape[:2] == (layout.crops, layout.grid**2)
    side = layout.side
    if layout.pool > 1:
        squares = features.unflatten(1, (layout.grid, layout.grid)).permute(0, 3, 1, 2)
        features = avg_pool2d(squares, layout.pool, ceil_mode=True).flatten(2).transpose(1, 2)
    if layout.bilinear:
        squares = features.unflatten(1, (layout.grid, layout.grid)).permute(0, 3, 1, 2)
        features = interpolate(squares, [side, side], mode="bilinear").flatten(2).transpose(1, 2)
    if layout.newline != "none":
        assert newline is not None
        newline = newline.to(features)
    if layout.tiles is None or layout.keep is None:
        if layout.newline == "none":
            return divprune(features, layout.length // layout.crops).flatten(0, 1)
        assert newline is not None
        if layout.newline == "end":
            return torch.cat([features.flatten(0, 1), newline[None]])
        lines = features.unflatten(1, (side, side)) if layout.newline == "row" else features
        return _with_newline(lines, newline).flatten(0, -2)
    rows, columns = layout.tiles
    top, left, height, width = layout.keep
    tiled = features[1:].unflatten(1, (side, side)).unflatten(0, (rows, columns))
    tiled = tiled.permute(0, 2, 1, 3, 4).reshape(rows * side, columns * side, -1)
    tiled = tiled[top : top + height, left : left + width]
    if layout.shrink is not None:
        squares = tiled.permute(2, 0, 1)[None].contiguous()
        tiled = interpolate(squares, list(layout.shrink), mode="bilinear")[0].permute(1, 2, 0)
    if newline is not None and layout.newline == "row":
        tiled = _with_newline(tiled, newline)
        return torch.cat([features[0], tiled.flatten(0, 1)])
    return divprune(torch.cat([features[0], tiled.flatten(0, 1)])[None], layout.length)[0]


def _with_newline(lines: Tensor, newline: Tensor) -> Tensor:
    """`[..., n, D]` with the newline `[D]` after each line: `[..., n + 1, D]`."""
    return torch.cat([lines, newline.expand(*lines.shape[:-2], 1, -1)], dim=-2)


def divprune(features: Tensor, count: int) -> Tensor:
    """Of `[N, T, D]` the `count` of T tokens that differ most from each other by cosine distance,
    in order: `[N, count, D]`.

    The first is the token that is farthest from its nearest neighbor, then each time the one that
    is farthest from all selected ones (max-min diversity). Source: DivPrune, Alvar et al. 2025,
    arXiv 2503.02175.
    """
    n, tokens = features.shape[:2]
    if count == tokens:
        return features
    unit = normalize(features.detach().float(), dim=-1)
    row = torch.arange(n, device=features.device)
    distance = 1 - unit @ unit.transpose(1, 2)
    selected = torch.zeros(n, tokens, dtype=torch.bool, device=features.device)
    nearest = (distance + 4 * torch.eye(tokens, device=features.device)).amin(-1)
    for number in range(count):
        best = nearest.masked_fill(selected, -1).argmax(-1)
        selected[row, best] = True
        nearest = torch.minimum(nearest, distance[row, best]) if number else distance[row, best]
    return features[selected].unflatten(0, (n, count))
