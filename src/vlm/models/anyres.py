"""Images in tiles (`anyres`): the grid of an image, its tiles, and the number of its tokens.

As LLaVA-NeXT (https://llava-vl.github.io/blog/2024-01-30-llava-next/) and LLaVA-OneVision (Li et al. 2024,
arXiv:2408.03326, section 3.2) do it: the whole image is squashed to a square, then come its tiles; the features of the
tiles are put together again, the padding is cut off, and each row ends with a learned vector.

Hub code: imports torch and transformers only. The processor and the model use the same class.

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
"""The number of views that marks a frame of a video: it is one square, whose tokens are pooled."""


@dataclass(frozen=True)
class AnyRes:
    """How images are cut into tiles and their features put together.

    Attributes:
        grids: allowed (rows, columns) of tiles; of equally good ones the first is used.
        tile_size: side of a view in pixels.
        tokens_side: side of the grid of tokens of a view.
        max_tiles: the tokens of tiles are bilinearly interpolated to at most about those of so many tiles
            (`anyres_max_9`: 9); None for no limit.
        tile_several: whether images are tiled where a sample has several; otherwise each is one view.
    """

    grids: Sequence[Sequence[int]]
    tile_size: int
    tokens_side: int
    max_tiles: int | None = None
    tile_several: bool = False

    def num_views(self, sizes: Sequence[Size | None]) -> list[int]:
        """Return the number of views of each image of one sample: 1 and its tiles, 1, or `VIDEO_FRAME_VIEWS`.

        Args:
            sizes: height and width of each image in pixels, in order; None for a frame of a video.
        """
        several = sum(size is not None for size in sizes) > 1 and not self.tile_several
        return [
            VIDEO_FRAME_VIEWS if size is None else 1 if several else 1 + math.prod(self.grid(size)) for size in sizes
        ]

    def grid(self, size: Size) -> Size:
        """Return the rows and columns of tiles that keep most pixels of the image, then that need least padding."""
        side = self.tile_size
        height, width = select_best_resolution(size, [(rows * side, columns * side) for rows, columns in self.grids])
        return height // side, width // side

    def image_tokens(self, sizes: Sequence[Size | None]) -> list[int]:
        """Return the number of tokens of each image of one sample; `sizes` as in `num_views`."""
        return [self.num_tokens(size, views) for size, views in zip(sizes, self.num_views(sizes), strict=True)]

    def num_tokens(self, size: Size | None, views: int) -> int:
        """Return the number of tokens of one image.

        Args:
            size: height and width in pixels; None for a frame of a video.
            views: the number of its views, see `num_views`.
        """
        whole = self.tokens_side**2
        if size is None or views == VIDEO_FRAME_VIEWS:
            return self.pooled_side**2
        if views == 1:
            return whole + 1
        rows, columns = self.limit_size(self.unpadded_size(size))
        return whole + rows * (columns + 1)

    @property
    def pooled_side(self) -> int:
        """The side of the grid of tokens of a frame."""
        return math.ceil(self.tokens_side / 2)

    def unpadded_size(self, size: Size) -> Size:
        """Return the rows and columns of the tiles' tokens without padding, which is cut off equally at both sides.

        The rounding is transformers' (`unpad_image`), since it decides how many tokens there are.
        """
        height, width = size
        rows, columns = (number * self.tokens_side for number in self.grid(size))
        if width / height > columns / rows:
            num_rows = int(round(height * (columns / width), 7))
            return rows - (rows - num_rows) // 2 * 2, columns
        num_columns = int(round(width * (rows / height), 7))
        return rows, columns - (columns - num_columns) // 2 * 2

    def limit_size(self, unpadded_size: Size) -> Size:
        """Return the rows and columns within `max_tiles`; they shrink where they are more than 1.1 times too long."""
        if self.max_tiles is None:
            return unpadded_size
        times = math.sqrt(unpadded_size[0] * unpadded_size[1] / (self.max_tiles * self.tokens_side**2))
        return unpadded_size if times <= 1.1 else (int(unpadded_size[0] // times), int(unpadded_size[1] // times))

    def cut_tiles(self, image: Tensor, resize: Callable[[Tensor, int, int], Tensor]) -> Tensor:
        """Resize an image to fit its grid, in the middle of black, and cut it row by row: `(tiles, 3, side, side)`.

        The image is `(3, height, width)`, before normalisation; `resize` resizes an image to a height and width.
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
        """Pool the tokens of a frame bilinearly to half the side, rounded up: `(N, D) -> (pooled, D)`."""
        grid = tokens.T.unflatten(1, (self.tokens_side, self.tokens_side))  # (D, side, side)
        return F.interpolate(grid[None], size=(self.pooled_side,) * 2, mode="bilinear")[0].flatten(1).T

    def stitch_tiles(self, tokens: Tensor, size: Size) -> Tensor:
        """Join the tokens of an image's tiles in one grid without padding: `(tiles, N, D) -> (D, rows, columns)`."""
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
    """Joins the tokens of views image by image, with a learned vector after each row of tiles.

    The vector is used in every forward pass, so that it has a gradient on every rank for any images.
    """

    def __init__(self, anyres: AnyRes, text_dim: int):
        super().__init__()
        self.anyres = anyres
        self.weight = nn.Parameter(torch.empty(text_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the vector as LLaVA does: each entry with standard deviation `1 / sqrt(text_dim)`."""
        nn.init.normal_(self.weight, std=len(self.weight) ** -0.5)

    def forward(self, tokens: Tensor, sizes: Sequence[Size], views: Sequence[int]) -> Tensor:
        """Return the tokens of all images in sequence: `(V, N, D) -> (tokens, D)`.

        Args:
            tokens: the tokens of all views.
            sizes: height and width of each image in pixels; any for frames.
            views: number of views of each image.
        """
        newline = self.weight.to(tokens.dtype)
        parts = [newline[None, :][:0]]  # empty, but with a gradient
        tokens_by_image = tokens.split([max(number, 1) for number in views])
        for image_tokens, size, number in zip(tokens_by_image, sizes, views, strict=True):
            if number == VIDEO_FRAME_VIEWS:
                parts.append(self.anyres.pool_frame(image_tokens[0]))
            elif number == 1:
                parts += [image_tokens[0], newline[None, :]]
            else:
                grid = self.anyres.stitch_tiles(image_tokens[1:], size)  # (D, rows, columns)
                grid = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=2)
                parts += [image_tokens[0], grid.flatten(1).T]
        return torch.cat(parts)


def first_mismatched_row(rows: Sequence[int], images: Sequence[int]) -> int | None:
    """Return the first row whose placeholders do not add up to whole images in order; None where all rows do.

    `rows` has the placeholders of each row, `images` the tokens of each image.
    """
    remaining_images = iter(images)
    for row, placeholders in enumerate(rows):
        while placeholders > 0:
            placeholders -= next(remaining_images, placeholders + 1)
        if placeholders:
            return row
    return None if next(remaining_images, None) is None else len(rows) - 1
