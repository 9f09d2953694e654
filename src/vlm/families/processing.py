"""A family's own processor, seen through the interface of ours: rendered conversations to ids, media to inputs.

Every id and every pixel is the family's own; what is added is where each id came from, so that exactly the replies
are supervised.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from vlm.data.encoding.labels import IGNORE_INDEX
from vlm.data.processor import Processor
from vlm.data.sample import Clip
from vlm.data.vision.video import DecodedVideo
from vlm.families.table import Family
from vlm.families.videos import FamilyVideos, joined
from vlm.models.pixels import as_rgb
from vlm.models.processing_vlm import FIXED_CLOCK, FIXED_DATE, VLMProcessor

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "cross_attention_mask")
"""Outputs of a processor that belong to its text."""

Size = tuple[int, int]
Replacements = list[tuple[int, int, str]]
"""(start, end, what stands there instead) of each token of an image or video of a text."""


class FamilyProcessor:
    """What training, inference and evaluation ask of a processor, answered by a family's own.

    Args:
        native: the family's processor.
        family: its row of the table.
        chat_template: another template than its own.

    Raises:
        ValueError: it brings no chat template, and none is given.
    """

    needs_image_sizes = True
    pools_video_frames = False
    accepts_tensors = False

    def __init__(self, native: Any, family: Family, chat_template: str | None = None):
        self.native = native
        self.family = family
        self.per_sample_inputs, self.per_token_inputs = family.rows, family.tokens
        self.deduplicated_inputs = ()
        self.tokenizer = native.tokenizer
        self.image_processor = native.image_processor
        self.image_token: str = native.image_token
        self.videos = FamilyVideos(native, family) if family.videos else None
        self.video_token = None if self.videos is None else self.videos.token
        own = native.chat_template or self.tokenizer.chat_template
        self.own_template = own if isinstance(own, str) else family.template
        self.chat_template = chat_template or self.own_template
        if self.chat_template is None:
            raise ValueError(f"{family.name}: its processor brings no chat template. Name one with dataset.template.")
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self.media_tokens = [token for token in (self.image_token, self.video_token) if token is not None]
        every = sorted({*special, *self.media_tokens}, key=len, reverse=True)
        self.special_tokens = re.compile("|".join(map(re.escape, every)))
        self._cached_expansions = lru_cache(4096)(self._compute_expansions)

    def __reduce__(self) -> tuple[Any, ...]:
        """Made anew where it is sent to, such as a data worker."""
        return type(self), (self.native, self.family, self.chat_template)

    def __copy__(self) -> "FamilyProcessor":
        return type(self)(self.native, self.family, self.chat_template)

    @property
    def image_token_id(self) -> int:
        """The id at whose positions image features are placed: the most frequent one of an image."""
        return self._media_token_ids[0]

    @property
    def video_token_id(self) -> int | None:
        """The id at whose positions features of videos are placed: that of the video token, or that of images."""
        return self._media_token_ids[1]

    @cached_property
    def _media_token_ids(self) -> tuple[int, int | None]:
        counts = Counter(self.image_token_ids())
        image_id = max(counts, key=lambda token_id: (counts[token_id], token_id == self.native.image_token_id))
        if self.videos is None:
            return image_id, None
        video_id: int = self.tokenizer.convert_tokens_to_ids(self.videos.token)
        ids, _ = self.tokenize(self.videos.token, (), [self.videos.minimal_clip])
        return image_id, video_id if video_id in ids else image_id

    @property
    def encodes_videos_separately(self) -> bool:
        """Whether the model reads videos by a call of their own."""
        return self.videos is not None and not self.family.joined

    def image_token_ids(self) -> list[int]:
        """The ids of a small image by itself."""
        return self.tokenize(self.image_token, (), [(64, 64)])[0]

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """A conversation as text, a token for each picture and video.

        Contents may be strings with such tokens in them; the template reads them as lists of text, images and videos.
        """
        template = self.chat_template
        assert template is not None
        own = template == self.own_template
        if own and self.family.video_template and any(map(self._shows_video, conversation)):
            template = self.family.video_template
        if "strftime_now" in template:
            template = FIXED_CLOCK + template
        messages = [dict(turn) for turn in conversation]
        if own and self._own_template_takes_lists:
            messages = [{**turn, "content": self._to_items(turn["content"])} for turn in conversation]
        return self._render(messages, template, add_generation_prompt)

    @cached_property
    def _own_template_takes_lists(self) -> bool:
        """Whether the family's template wants lists of text and images; a few want strings with image tokens."""
        question = [{"type": "image"}, {"type": "text", "text": "a question"}]
        try:
            rendered = self._render([{"role": "user", "content": question}], str(self.own_template), False)
        except (jinja2.TemplateError, TypeError):
            return False
        return self.image_token in rendered and "'type'" not in rendered

    def _render(self, messages: list[dict[str, Any]], template: str, add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False,
            date_string=FIXED_DATE, enable_thinking=False,
        )  # fmt: skip

    def _to_items(self, content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not isinstance(content, str):
            return content
        kinds = {self.image_token: "image", self.video_token: "video"}
        pieces = re.split(f"({'|'.join(map(re.escape, self.media_tokens))})", content)
        return [
            {"type": kinds[piece]} if piece in kinds else {"type": "text", "text": piece} for piece in pieces if piece
        ]

    def _shows_video(self, turn: Mapping[str, Any]) -> bool:
        return any(item["type"] == "video" for item in self._to_items(turn["content"]))

    # --- text -------------------------------------------------------------------------------------------------------

    def tokenize(
        self, text: str, user_spans: Sequence[tuple[int, int]] = (), sizes: Sequence[Size | Clip] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered conversation, and the character span that each came from.

        Tokens of images and videos become what the family's processor makes of them; the whole is tokenised at once,
        as it does. Only a special token that somebody spelled is taken apart.

        Args:
            text: a rendered conversation; each token of an image or video outside `user_spans` stands for one.
            user_spans: character spans that people wrote, in order.
            sizes: height and width of each image, and what is seen of each video, in order.

        Raises:
            ValueError: the text has more or fewer such tokens than there are images and videos, or another order of
                them where the model reads both by the same inputs.
        """
        expanded, replaced, cuts = self._expand_media_tokens(text, user_spans, sizes)
        bos = self.tokenizer.bos_token
        has_bos = bool(bos) and bos in text[: user_spans[0][0] if user_spans else None]  # the template wrote it already
        starts = [0, *cuts]
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for start, end in pairwise([*starts, len(expanded)]):
            lead = self.image_token if start else ""  # behind a token, no tokenizer begins a word of its own
            encoded = self.tokenizer(
                lead + expanded[start:end], return_offsets_mapping=True, add_special_tokens=not start and not has_bos
            )
            skipped = 1 if lead else 0
            ids += encoded["input_ids"][skipped:]
            spans += [
                (start - len(lead) + a, start - len(lead) + b) if b else (0, 0)
                for a, b in encoded["offset_mapping"][skipped:]
            ]
        return ids, _map_to_original(spans, replaced)

    def _expand_media_tokens(
        self, text: str, user_spans: Sequence[tuple[int, int]], sizes: Sequence[Size | Clip]
    ) -> tuple[str, Replacements, list[int]]:
        """The text with its media's tokens replaced, what was replaced, and where spelled special tokens are cut."""
        places, cuts = [], []
        for match in self.special_tokens.finditer(text):
            if any(a <= match.start() and match.end() <= b for a, b in user_spans):
                cuts.append(match.start() + 1)  # neither half is a special token
            elif match.group() in self.media_tokens:
                places.append(match.span())
        expansions = self._get_expansions([text[start:end] for start, end in places], sizes)
        replaced = [(start, end, new) for (start, end), new in zip(places, expansions, strict=True)]
        shifts = [(end, len(new) - (end - start)) for start, end, new in replaced]
        moved = [cut + sum(shift for end, shift in shifts if end <= cut) for cut in cuts]
        pieces, last = [], 0
        for start, end, new in replaced:
            pieces += [text[last:start], new]
            last = end
        return "".join([*pieces, text[last:]]), replaced, moved

    def _get_expansions(self, tokens: list[str], sizes: Sequence[Size | Clip]) -> list[str]:
        """What stands for each image and video, in the order of their tokens in the text."""
        given = [self.video_token if isinstance(size, Clip) else self.image_token for size in sizes]
        for token, kind in zip(self.media_tokens, ("images", "videos"), strict=False):
            if given.count(token) != tokens.count(token):
                raise ValueError(f"{given.count(token)} {kind} given, but the text has {tokens.count(token)} {token}")
        if self.family.joined and tokens != given:
            raise ValueError("the template moves videos behind images, which this model cannot tell apart then")
        images = tuple(size for size in sizes if not isinstance(size, Clip))
        of_images = iter(self._cached_expansions(images) if images else ())
        of_videos = iter([self.videos.expansion(size) for size in sizes if self.videos and isinstance(size, Clip)])
        return [next(of_videos if token == self.video_token else of_images) for token in tokens]

    def _compute_expansions(self, sizes: tuple[Size, ...]) -> tuple[str, ...]:
        """What the family writes for images of these sizes in one sample: their content does not matter."""
        return self._process_images([Image.new("RGB", (width, height)) for height, width in sizes])[1]

    # --- images -----------------------------------------------------------------------------------------------------

    def _process_images(self, images: Sequence[Image.Image]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """What the model reads of a sample's images, and what stands for each in its text."""
        out = self.native(
            text=[self.image_token * len(images)], images=[list(images)], return_tensors="pt",
            return_text_replacement_offsets=True,
        )  # fmt: skip
        replacements = out.pop("text_replacement_offsets", None)
        if replacements is None:  # a family that writes one token for an image, whatever it looks like
            expansions = (self.image_token,) * len(images)
        else:
            expansions = tuple(one["replacement"] for one in replacements[0])
        return {name: value for name, value in out.items() if name not in TEXT_INPUTS}, expansions

    def image_inputs(self, images: Sequence[Any], sizes: Sequence[Any] = ()) -> dict[str, Tensor]:
        """What the model reads of a sample's images and videos, as the family's processor gives it.

        Nothing where it has none. Where both are read by the same inputs, they stand there in order.
        """
        videos = [image for image in images if isinstance(image, DecodedVideo)]
        if not videos:
            return self._process_images([as_rgb(image) for image in images])[0] if images else {}
        if self.family.joined:
            return joined([self._process_one(image) for image in images], self.per_sample_inputs)
        pictures = self.image_inputs([image for image in images if not isinstance(image, DecodedVideo)])
        return pictures | joined([self._process_one(video) for video in videos], self.per_sample_inputs)

    def _process_one(self, image: Any) -> dict[str, Tensor]:
        """What the model reads of one image or video by itself."""
        if self.videos is None or not isinstance(image, DecodedVideo):
            return self._process_images([as_rgb(image)])[0]
        return {name: value for name, value in self.videos.inputs(image).items() if name not in TEXT_INPUTS}

    def text_inputs(self, ids: Sequence[int], labels: Sequence[int], images: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model reads for each token besides its id: `(tokens, …)` each."""
        found = {}
        for name in self.per_token_inputs:
            if name == "cross_attention_mask":
                if images:
                    found[name] = self._cross_attention_mask(ids, images)
            elif self.native.return_mm_token_type_ids:
                found[name] = torch.tensor(self.native.create_mm_token_type_ids([list(ids)])[0])
            else:  # PaliGemma: what follows the first supervised token attends to the past only
                first = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
                found[name] = torch.tensor([0] * first + [1] * (len(ids) - first))
        return found

    def _cross_attention_mask(self, ids: Sequence[int], images: dict[str, Tensor]) -> Tensor:
        """Which token attends to which tile of which image: `(tokens, images, tiles)`."""
        tiles = images["aspect_ratio_mask"].sum(-1).tolist()  # (1, images)
        places = [get_cross_attention_token_mask(list(ids), self.image_token_id)]
        most = self.image_processor.max_image_tiles
        return torch.from_numpy(convert_sparse_cross_attention_mask_to_dense(places, tiles, most, len(ids)))[0]

    def normalise(self, pixels: Tensor) -> Tensor:
        """The family's processor has done it already."""
        return pixels

    # --- files ------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The processor's settings."""
        return self.native.to_dict()

    def save_pretrained(self, folder: str | Path) -> None:
        """The family's own processor, with the template that was used."""
        if self.chat_template != self.own_template or self.native.chat_template is None:
            self.native.chat_template = self.chat_template
        self.native.save_pretrained(folder)


def load_family_processor(
    name: str, family: Family, *, revision: str | None = None, trust_remote_code: bool = False
) -> FamilyProcessor:
    """The processor of a Hub name or folder."""
    native = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    return FamilyProcessor(native, family)


def _map_to_original(spans: list[tuple[int, int]], replaced: Replacements) -> list[tuple[int, int]]:
    """Spans in the expanded text as spans in the rendered one; whatever lies in an expansion is the image token's."""
    found = []
    remaining = iter([*replaced, None])
    image = next(remaining)
    shift = 0
    for a, b in spans:
        while image is not None and a - shift >= image[0] + len(image[2]):
            shift += len(image[2]) - (image[1] - image[0])
            image = next(remaining)
        if image is not None and b - shift > image[0]:
            found.append((min(a - shift, image[0]), image[1]))
        else:
            found.append((a - shift, b - shift))
    return found


if TYPE_CHECKING:  # both implementations satisfy the Protocol

    def _as_processors(composed: VLMProcessor, family: FamilyProcessor) -> tuple[Processor, Processor]:
        return composed, family
