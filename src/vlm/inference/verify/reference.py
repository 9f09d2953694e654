"""Training's own path: records through the data pipeline, the collator and the model, as a step has them."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from vlm.config.schema import InferenceConfig
from vlm.data.batching.collator import Collator
from vlm.data.blank_images import dummy_image
from vlm.data.dataset import model_inputs
from vlm.data.encoding.labels import IGNORE_INDEX, Encoded
from vlm.data.encoding.sample_encoder import NO_LIMIT, SampleEncoder
from vlm.data.processor import Processor, SampleInputs
from vlm.data.sample import BadSample, Sample, Turn
from vlm.data.vision.images import media_sizes_from_opened, open_media
from vlm.data.vision.jpeg import decode_sample_images
from vlm.inference.generate import VisionLanguageModel, check_length, on_device
from vlm.inference.verify.cases import Case
from vlm.inference.verify.engines import IDS, LOGITS, NUM_LOGITS, PIXELS, State
from vlm.inference.verify.plain_reader import traced

REPLY = "Yes."
"""The reply of a record that is made of a question: training encodes conversations with replies."""


class Reference:
    """A model as training runs it.

    Args:
        model: the model, in evaluation mode, with its processor.
    """

    def __init__(self, model: VisionLanguageModel):
        self.model = model
        processor = model.processor
        duplicates = processor.deduplicated_inputs
        self._collate = Collator.of(processor, dummy_image(processor), deduplicate=duplicates)
        self._collate_all = Collator.of(processor)  # without a dummy, and equal images as often as they occur

    def usable(self, cases: Iterable[Case], max_new_tokens: int) -> tuple[list[Case], list[str]]:
        """Return the cases that training could have read, and why the others could not: as its template has it."""
        kept: list[Case] = []
        reasons: list[str] = []
        for case in cases:
            try:
                length = len(self._item(case)["input_ids"])
                check_length(length, self.model.positions, max_new_tokens)
            except BadSample as error:
                reasons.append(error.reason)
            except ValueError as error:
                reasons.append(str(error))
            else:
                kept.append(case)
        return kept, reasons

    def _item(self, case: Case) -> SampleInputs:
        """Return the inputs of a question, as the collator takes them.

        Raises:
            BadSample: the template or the processor refuses it.
        """
        return question_of_record(self.model.processor, case)

    def inputs(self, case: Case) -> State:
        """Return a case alone in a batch: `input_ids` `(1, tokens)` and so on, normalised, without any dummy."""
        batch = self._collate_all([self._item(case)])
        return on_device(batch, self.model.processor, self.model.model.device)

    def _training_batch(self, case: Case) -> State:
        batch = self._collate([self._item(case)])
        return on_device(batch, self.model.processor, self.model.model.device)

    @torch.no_grad()
    def outputs(self, case: Case, *, ids_only: bool = False) -> State:
        """Return `ids` `(tokens,)`, `logits` `(positions, vocabulary)`, and of images `pixels` and `image_views`."""
        inputs = self.inputs(case)
        outputs = {IDS: inputs["input_ids"][0].cpu()}
        if ids_only:
            return outputs
        if "pixel_values" in inputs:
            outputs[PIXELS] = inputs["pixel_values"].cpu()
        if "image_views" in inputs:
            outputs["image_views"] = inputs["image_views"].cpu()
        outputs[LOGITS] = self._last_logits(self._training_batch(case), inputs["input_ids"].shape[1])
        return outputs

    def _last_logits(self, batch: State, length: int) -> Tensor:
        """Return the logits of the last positions before any padding and dummy: `(positions, vocabulary)`."""
        logits = self.model.model(**batch).logits[0, :length]
        return logits[-NUM_LOGITS:].cpu()

    @torch.no_grad()
    def trace(self, case: Case) -> State:
        """Return what the parts give for one case, see `Engine.trace`."""
        outputs: State = {}
        inputs = self.inputs(case)
        with traced(self.model.model, outputs):
            self.model.model(**inputs)
        return {name: tensor.detach().cpu() for name, tensor in outputs.items()}

    def answer(self, case: Case, max_new_tokens: int) -> str:
        """Return the greedy answer to a question, as a run samples answers while it trains."""
        opened = open_media(Sample(case.name, case.turns))
        settings = InferenceConfig(temperature=0, max_new_tokens=max_new_tokens)
        return self.model.answer([case.turns], [opened], settings)[0]

    def ends(self) -> list[int]:
        """Return the ids that end an answer; empty where the template ends replies by another text."""
        return self.model.generation_options(InferenceConfig(temperature=0)).get("eos_token_id", [])

    @torch.no_grad()
    def margin(self, case: Case, ours: str, theirs: str) -> float:
        """Return how far the first token in which two answers differ is from being the other one.

        Returns:
            The difference of both tokens' logits, as a share of the norm of all logits over the root of their number:
            of the size that `comparison.largest_difference` measures. An answer that ends first has the end of a reply
            as its next token.
        """
        tokenizer = self.model.processor.tokenizer
        end = (self.ends() or [tokenizer.eos_token_id])[0]
        both = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in (ours, theirs)]
        place = next((n for n, pair in enumerate(zip(*both, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            return 0.0
        item = self._item(case)
        prefix = both[0][:place]
        item["input_ids"] = [*item["input_ids"], *prefix]
        item["labels"] = [IGNORE_INDEX] * len(item["input_ids"])
        batch = on_device(self._collate_all([item]), self.model.processor, self.model.model.device)
        logits = self._last_logits(batch, batch["input_ids"].shape[1])[-1].double()
        difference = (logits[both[0][place]] - logits[both[1][place]]).abs()
        return float(difference / logits.square().mean().sqrt().clamp(min=1e-12))


def question_of_record(processor: Processor, case: Case) -> SampleInputs:
    """Encode a record of training, the question with a reply, and return what stands before the reply.

    Raises:
        BadSample: the template or the processor refuses the record.
    """
    history = [replace(turn, supervised=False) for turn in case.turns]
    sample = Sample(case.name, (*history, Turn("assistant", (REPLY,))))
    media = decode_sample_images(sample, processor)
    sizes = media_sizes_from_opened(sample.media, media, processor)
    encoded = SampleEncoder(processor, NO_LIMIT, truncate=False)(sample, sizes)
    length = next(place for place, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    question = Encoded(encoded.input_ids[:length], [IGNORE_INDEX] * length)
    return model_inputs(processor, question, media, sizes, sample)
