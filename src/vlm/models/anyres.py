"""Pictures in tiles (`anyres`): which grid a picture takes, how it is cut, and how many tokens come of it.

As LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next/) and LLaVA-OneVision (Li et al. 2024,
arXiv:2408.03326, section 3.2) do it: the whole picture squashed to one square, then its tiles; their features are put
together again, the padding is cut off, and each row ends with a learned vector.

Hub code: imports torch and transformers only. The processor counts and cuts with what the model lays out with.

Shapes: I images of a batch, V views (squares that the visual encoder sees), N tokens of a view, D text width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.image_processing_utils import select_best_resolution

Size = tuple[int, int]
"""Height and width."""

VIDEO_FRAME_VIEWS = 0
"""The number of views of a video's frame: it is one square, whose tokens are pooled."""


@dataclass(frozen=True)
class AnyRes:
    """How pictures are taken apart and put together again.

    Attributes:
        grids: allowed (rows, columns) of tiles; between equally good ones the first is taken.
        tile_size: side of a view in pixels.
        tokens_side: side of the grid of tokens that a view becomes.
        max_tiles: a picture's tiles give at most about the tokens of so many tiles (`anyres_max_9`: 9), by bilinear
            interpolation; None: all.
        tile_several: whether each of several pictures in a sample is tiled too; else each is one view.
    """

    grids: Sequence[Sequence[int]]
    tile_size: int
    tokens_side: int
    max_tiles: int | None = None
    tile_several: bool = False

    def num_views(self, sizes: Sequence[Size | None]) -> list[int]:
        """Views of each picture of one sample: the whole and its tiles, the whole alone (1), or `FRAME`.

        Args:
            sizes: of its pictures in order; None for frames of videos.
        """
        several = sum(size is not None for size in sizes) > 1 and not self.tile_several
        return [
            VIDEO_FRAME_VIEWS if size is None else 1 if several else 1 + math.prod(self.grid(size)) for size in sizes
        ]

    def grid(self, size: Size) -> Size:
        """Rows and columns of tiles: where most pixels of the picture are kept, then where least is padded."""
        side = self.tile_size
        height, width = select_best_resolution(size, [(rows * side, columns * side) for rows, columns in self.grids])
        return height // side, width // side

    def image_tokens(self, sizes: Sequence[Size | None]) -> list[int]:
        """Tokens of each picture of one sample; `sizes` as `num_views` takes them."""
        return [self.num_tokens(*image) for image in zip(sizes, self.num_views(sizes), strict=True)]

    def num_tokens(self, size: Size | None, views: int) -> int:
        """Tokens of one picture."""
        whole = self.tokens_side**2
        if size is None or views == VIDEO_FRAME_VIEWS:
            return self.pooled_side**2
        if views == 1:
            return whole + 1
        rows, columns = self.limit_size(self.unpadded_size(size))
        return whole + rows * (columns + 1)

    @property
    def pooled_side(self) -> int:
        """Side of the grid of tokens that a frame becomes."""
        return math.ceil(self.tokens_side / 2)

    def unpadded_size(self, size: Size) -> Size:
        """Rows and columns of the tiles' tokens that are not padding; as many are cut off at either side.

        The rounding is transformers' (`unpad_image`), since it decides how many tokens there are.
        """
        height, width = size
        rows, columns = (number * self.tokens_side for number in self.grid(size))
        if width / height > columns / rows:
            wanted = int(round(height * (columns / width), 7))
            return rows - (rows - wanted) // 2 * 2, columns
        wanted = int(round(width * (rows / height), 7))
        return rows, columns - (columns - wanted) // 2 * 2

    def limit_size(self, unpadded_size: Size) -> Size:
        """Rows and columns after `max_tiles`; they shrink where they are more than 1.1 times too long."""
        if self.max_tiles is None:
            return unpadded_size
        times = math.sqrt(unpadded_size[0] * unpadded_size[1] / (self.max_tiles * self.tokens_side**2))
        return unpadded_size if times <= 1.1 else (int(unpadded_size[0] // times), int(unpadded_size[1] // times))

    def cut_tiles(self, image: Tensor, resize: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """A picture's tiles, row by row, resized to fit their grid in the middle of black: `(tiles, 3, side, side)`.

        Args:
            image: `(3, height, width)`, before normalisation.
            resize: to a height and width.
        """
        height, width = image.shape[1:]
        rows, columns = self.grid((height, width))
        full_height, full_width = rows * self.tile_size, columns * self.tile_size
        if full_width / width < full_height / height:
            new = min(math.ceil(height * (full_width / width)), full_height), full_width
        else:
            new = full_height, min(math.ceil(width * (full_height / height)), full_width)
        down, right = full_height - new[0], full_width - new[1]
        edges = (right // 2, right - right // 2, down // 2, down - down // 2)
        whole = F.pad(resize(image, *new), edges)  # (3, full_height, full_width)
        tiles = whole.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # (3, rows, side, columns, side)
        return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)

    def pool_frame(self, tokens: Tensor) -> Tensor:
        """The tokens of a frame, bilinearly pooled to half the side, rounded up: `(N, D) -> (pooled, D)`."""
        grid = tokens.T.unflatten(1, (self.tokens_side, self.tokens_side))  # (D, side, side)
        return F.interpolate(grid[None], size=(self.pooled_side,) * 2, mode="bilinear")[0].flatten(1).T

    def stitch_tiles(self, tokens: Tensor, size: Size) -> Tensor:
        """The tokens of a picture's tiles as one grid without the padding: `(tiles, N, D) -> (D, rows, columns)`."""
        side = self.tokens_side
        rows, columns = self.grid(size)
        grid = tokens.unflatten(1, (side, side)).unflatten(0, (rows, columns))  # (rows, columns, side, side, D)
        grid = grid.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # (D, rows * side, columns * side)
        height, width = self.unpadded_size(size)
        top, left = (rows * side - height) // 2, (columns * side - width) // 2
        grid = grid[:, top : top + height, left : left + width]
        if (limit := self.limit_size((height, width))) != (height, width):
            grid = F.interpolate(grid[None], size=limit, mode="bilinear")[0]
        return grid


class ImageNewline(nn.Module):
    """Lays the tokens of views out picture by picture, a learned vector behind each row of tiles.

    The vector takes part in every forward pass, so that it has a gradient on every rank whatever the pictures are.

    Args:
        anyres: how the pictures were taken apart.
        text_dim: width of the tokens.
    """

    def __init__(self, anyres: AnyRes, text_dim: int):
        super().__init__()
        self.anyres = anyres
        self.weight = nn.Parameter(torch.empty(text_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """About as long as LLaVA's first one: each entry of standard deviation `1 / sqrt(text_dim)`."""
        nn.init.normal_(self.weight, std=len(self.weight) ** -0.5)

    def forward(self, tokens: Tensor, sizes: Sequence[Size], views: Sequence[int]) -> Tensor:
        """Tokens of all pictures one after the other: `(V, N, D) -> (tokens, D)`.

        Args:
            tokens: of all views.
            sizes: height and width of each picture; of frames, anything.
            views: of each picture.
        """
        newline = self.weight.to(tokens.dtype)
        found = [newline[None, :][:0]]  # nothing, with a gradient
        split = tokens.split([max(number, 1) for number in views])
        for seen, size, number in zip(split, sizes, views, strict=True):
            if number == VIDEO_FRAME_VIEWS:
                found.append(self.anyres.pool_frame(seen[0]))
            elif number == 1:
                found += [seen[0], newline[None, :]]
            else:
                grid = self.anyres.stitch_tiles(seen[1:], size)  # (D, rows, columns)
                grid = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=2)
                found += [seen[0], grid.flatten(1).T]
        return torch.cat(found)


def first_mismatched_row(rows: Sequence[int], images: Sequence[int]) -> int | None:
    """The first row whose placeholders are not the tokens of whole images in order; None where all are.

    Args:
        rows: placeholders of each row.
        images: tokens of each image.
    """
    waiting = iter(images)
    for row, placeholders in enumerate(rows):
        left = placeholders
        while left > 0:
            left -= next(waiting, left + 1)
        if left:
            return row
    return None if next(waiting, None) is None else len(rows) - 1
