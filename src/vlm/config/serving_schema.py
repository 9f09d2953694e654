"""Every limit of `vlm serve`, with its default and what it means: `vlm serve CHECKPOINT serving.max_images=4`.

A new limit is a field here, with its default, its bounds and a docstring; `make docs` lists all of them in
`docs/configuration.md`. Imports its sibling `rules` only.
"""

from dataclasses import dataclass, field

from vlm.config.rules import above, at_least


@dataclass
class ServingConfig:
    """Limits of `vlm serve`, set on its command line. A request beyond one is refused with the limit's name."""

    max_body_bytes: int = field(default=32 * 2**20, metadata=at_least(1024))
    """The most bytes of a request's body, counted while they arrive."""
    max_pending_bytes: int = field(default=256 * 2**20, metadata=at_least(1024))
    """The most bytes of bodies that all requests together may have in memory; further ones get status 503."""
    max_prepared_bytes: int = field(default=4 * 2**30, metadata=at_least(1024))
    """The most bytes of prompts and images that are ready for the model and wait, or are being answered; further ones
    get status 503."""
    max_messages: int = field(default=512, metadata=at_least(1))
    """The most messages of a conversation."""
    max_parts: int = field(default=1024, metadata=at_least(1))
    """The most content parts (texts and images) of all messages of a request, or of all its inputs."""
    max_characters: int = field(default=400_000, metadata=at_least(1))
    """The most characters of all texts of a request, those of tools and schemas included."""
    max_characters_per_position: int = field(default=32, metadata=at_least(1))
    """The most characters of a request for each of the model's positions, so that what cannot fit is not tokenized."""
    max_images: int = field(default=8, metadata=at_least(0))
    """The most images of a request; 0: none are taken."""
    max_image_pixels: int = field(default=25_000_000, metadata=at_least(1))
    """The most pixels of an image, read from its header before it is decoded."""
    max_image_side: int = field(default=8192, metadata=at_least(1))
    """The most pixels of an image's longer side: some models pad an image to a square of that side."""
    max_aspect_ratio: float = field(default=50.0, metadata=at_least(1))
    """The largest ratio of an image's sides: some models enlarge an image until its shorter side is theirs."""
    max_request_pixels: int = field(default=50_000_000, metadata=at_least(1))
    """The most pixels of all images of a request."""
    max_stops: int = field(default=4, metadata=at_least(0))
    """The most texts of `stop`."""
    max_stop_characters: int = field(default=256, metadata=at_least(1))
    """The most characters of a text of `stop`."""
    max_tools: int = field(default=128, metadata=at_least(0))
    """The most tools of a request; 0: none are taken."""
    max_logit_bias: int = field(default=300, metadata=at_least(0))
    """The most tokens of `logit_bias`."""
    max_choices: int = field(default=8, metadata=at_least(1))
    """The most answers to one request (`n`)."""
    max_inputs: int = field(default=64, metadata=at_least(1))
    """The most inputs of a request to `/v1/classify` or `/v1/embeddings`."""
    max_tokens: int = field(default=4096, metadata=at_least(1))
    """The longest answer in tokens; a request without a number gets so many, or what the model's positions leave."""
    max_batch: int = field(default=8, metadata=at_least(1))
    """The most answers that the model writes at once."""
    max_queue: int = field(default=256, metadata=at_least(0))
    """The most answers that wait for a place among these; further requests get status 429 and `Retry-After`."""
    request_seconds: float = field(default=300.0, metadata=above(0))
    """Seconds that a request may take from its last byte to the end of its answer, waiting included."""
    body_seconds: float = field(default=30.0, metadata=above(0))
    """Seconds within which the body of a request has to arrive."""
    header_seconds: float = field(default=10.0, metadata=above(0))
    """Seconds within which the headers of a request have to arrive, from the connection or its first byte."""
    idle_seconds: int = field(default=5, metadata=at_least(1))
    """Seconds after which a connection without a request is closed."""
    max_connections: int = field(default=1024, metadata=at_least(1))
    """The most open connections, or what the system's limit of open files allows; further ones get status 503."""
    preparation_threads: int = field(default=2, metadata=at_least(1))
    """Threads that read requests, decode images and tokenize."""
