"""Every limit of `vlm serve`, with its default and meaning: `vlm serve CHECKPOINT serving.max_images=4`.

A new limit is a field here, with its default, its bounds and a docstring; `make docs` lists all of them in
`docs/configuration.md`. Imports its sibling `rules` only.
"""

from dataclasses import dataclass, field

from vlm.config.rules import above, at_least


@dataclass
class ServingConfig:
    """Limits of `vlm serve`, set on its command line. A request beyond a limit is rejected with its name."""

    max_body_bytes: int = field(default=32 * 2**20, metadata=at_least(1024))
    """Maximum number of bytes of a request's body, counted while they arrive."""
    max_pending_bytes: int = field(default=256 * 2**20, metadata=at_least(1024))
    """Maximum number of bytes of all request bodies in memory; further requests get status 503."""
    max_prepared_bytes: int = field(default=4 * 2**30, metadata=at_least(1024))
    """Maximum number of bytes of prompts and images that are waiting for the model or being answered; further requests
    get status 503."""
    max_messages: int = field(default=512, metadata=at_least(1))
    """Maximum number of messages of a conversation."""
    max_parts: int = field(default=1024, metadata=at_least(1))
    """Maximum number of content parts (texts and images) of all messages of a request, or of all its inputs."""
    max_characters: int = field(default=400_000, metadata=at_least(1))
    """Maximum number of characters of all texts of a request, including tools and schemas."""
    max_characters_per_position: int = field(default=32, metadata=at_least(1))
    """Maximum number of characters of a request for each of the model's positions, so that texts that cannot fit are
    not tokenized."""
    max_images: int = field(default=8, metadata=at_least(0))
    """Maximum number of images of a request; 0: no images are accepted."""
    max_image_pixels: int = field(default=25_000_000, metadata=at_least(1))
    """Maximum number of pixels of an image, read from its header before it is decoded."""
    max_image_side: int = field(default=8192, metadata=at_least(1))
    """Maximum length of an image's longer side in pixels, because some models pad an image to a square of that side."""
    max_aspect_ratio: float = field(default=50.0, metadata=at_least(1))
    """Maximum aspect ratio of an image, because some models enlarge an image until its shorter side fits."""
    max_request_pixels: int = field(default=50_000_000, metadata=at_least(1))
    """Maximum number of pixels of all images of a request."""
    max_stops: int = field(default=4, metadata=at_least(0))
    """Maximum number of `stop` strings."""
    max_stop_characters: int = field(default=256, metadata=at_least(1))
    """Maximum number of characters of a `stop` string."""
    max_tools: int = field(default=128, metadata=at_least(0))
    """Maximum number of tools of a request; 0: no tools are accepted."""
    max_logit_bias: int = field(default=300, metadata=at_least(0))
    """Maximum number of tokens in `logit_bias`."""
    max_choices: int = field(default=8, metadata=at_least(1))
    """Maximum number of answers to one request (`n`)."""
    max_inputs: int = field(default=64, metadata=at_least(1))
    """Maximum number of inputs of a request to `/v1/classify` or `/v1/embeddings`."""
    max_tokens: int = field(default=4096, metadata=at_least(1))
    """Maximum number of tokens of an answer. A request without a number gets this many, or as many as the model's
    positions allow."""
    max_batch: int = field(default=8, metadata=at_least(1))
    """Maximum number of answers that the model generates at once."""
    max_queue: int = field(default=256, metadata=at_least(0))
    """Maximum number of answers that wait for a place in the batch; further requests get status 429 and
    `Retry-After`."""
    request_seconds: float = field(default=300.0, metadata=above(0))
    """Maximum time of a request in seconds, from its last byte to the end of its answer, waiting included."""
    body_seconds: float = field(default=30.0, metadata=above(0))
    """Maximum time in seconds for the body of a request to arrive."""
    header_seconds: float = field(default=10.0, metadata=above(0))
    """Maximum time in seconds for the headers of a request to arrive, from the connection or its first byte."""
    idle_seconds: int = field(default=5, metadata=at_least(1))
    """Seconds after which a connection without a request is closed."""
    max_connections: int = field(default=1024, metadata=at_least(1))
    """Maximum number of open connections, or what the system's limit of open files allows; further ones get status
    503."""
    preparation_threads: int = field(default=2, metadata=at_least(1))
    """Number of threads that read requests, decode images and tokenize."""
