"""Images at native resolution: the grid of patches of an image, and the number of its tokens.

An image keeps its aspect ratio: its sides become multiples of a patch, and its number of patches is within bounds, as
in NaViT (Dehghani et al. 2023, arXiv:2307.06304) and Qwen2-VL (Wang et al. 2024, arXiv:2409.12191, section 2.1). The
number of tokens then depends on the image. The processor and the model use the same class.

Hub code: imports torch only.

Shapes: I images of a batch, N patches of all of them, row by row and image by image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns."""


@dataclass(frozen=True)
class NativeResolution:
    """How large an image is made for a visual encoder, and how many tokens it has.

    Attributes:
        patch_size: side of a patch in pixels.
        multiple: rows and columns of patches are multiples of it, so that the encoder and the connector can merge
            squares of patches.
        factor: side of the square of patches that becomes one token.
        min_patches: an image with fewer patches is enlarged.
        max_patches: an image with more patches is made smaller.
        num_queries: tokens of every image, where the connector reads the patches with queries; None: one token for each
            square of patches.
    """

    patch_size: int
    multiple: int
    factor: int
    min_patches: int
    max_patches: int
    num_queries: int | None = None

    def grid(self, size: Grid) -> Grid:
        """Return the rows and columns of patches of an image; `size` is its height and width in pixels.

        For images that are not far longer than wide it is Qwen2-VL's `smart_resize`. The aspect ratio of others is
        changed, so that a line of pixels stays within the bounds too.
        """
        side = self.patch_size * self.multiple
        most = max(self.max_patches // self.multiple**2, 1)
        least = min(-(-self.min_patches // self.multiple**2), most)
        height, width = size
        rows, columns = max(round(height / side), 1), max(round(width / side), 1)
        if rows * columns > most:
            scale = math.sqrt(most * side**2 / (height * width))
            rows, columns = max(int(height * scale / side), 1), max(int(width * scale / side), 1)
        elif rows * columns < least:
            scale = math.sqrt(least * side**2 / (height * width))
            rows, columns = math.ceil(height * scale / side), math.ceil(width * scale / side)
        if rows * columns > most:  # of one row, or enlarged where both bounds are close
            rows, columns = (rows, most // rows) if rows <= columns else (most // columns, columns)
        return rows * self.multiple, columns * self.multiple

    def token_grid(self, grid: Grid) -> Grid:
        """Return the rows and columns of tokens for those of patches; only without queries."""
        return grid[0] // self.factor, grid[1] // self.factor

    def num_tokens(self, grid: Grid) -> int:
        """Return the number of tokens for the rows and columns of patches."""
        return math.prod(self.token_grid(grid)) if self.num_queries is None else self.num_queries

    def image_tokens(self, sizes: Sequence[Grid]) -> list[int]:
        """Return the number of tokens of images of these heights and widths in pixels."""
        return [self.num_tokens(self.grid(size)) for size in sizes]


def cut_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """Cut an image into patches, row by row: `(3, height, width) -> (patches, 3, patch_size, patch_size)`."""
    rows, columns = pixels.shape[1] // patch_size, pixels.shape[2] // patch_size
    squares = pixels.unflatten(2, (columns, patch_size)).unflatten(1, (rows, patch_size))
    return squares.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (3, rows, side, columns, side) before


def join_patches(patches: Tensor, grid: Grid) -> Tensor:
    """Put images of one grid together again: `(images * patches, 3, side, side) -> (images, 3, height, width)`."""
    squares = patches.unflatten(0, (-1, *grid))  # (images, rows, columns, 3, side, side)
    return squares.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def square_order(grids: Sequence[Grid], side: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the order in which the patches of each square of `side` x `side` stand together: `(N,)`.

    Squares are row by row, and so are the patches in each. `side` divides the rows and columns of every grid.
    """
    order, start = [], 0
    for rows, columns in grids:
        places = torch.arange(start, start + rows * columns).view(rows // side, side, columns // side, side)
        order.append(places.transpose(1, 2).reshape(-1))
        start += rows * columns
    return torch.cat(order).to(device)
