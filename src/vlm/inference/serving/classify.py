"""`/v1/classify`: the predictions of a model's heads, in the form that vLLM has for one head, with all heads beside."""

import time
from contextlib import ExitStack

from vlm.data.processor import SampleInputs
from vlm.inference.predict import Prediction, Predictor
from vlm.inference.serving.answers import make_id, make_usage
from vlm.inference.serving.batcher import Batcher
from vlm.inference.serving.chat import translate_engine_error
from vlm.inference.serving.pooling_request import ClassifyRequest, count_tokens, parse_inputs, prepare_inputs
from vlm.inference.serving.service import Call, Service
from vlm.models.configuration_prediction import HeadSettings

DEFAULT_THRESHOLD = 0.5
"""The least probability at which a label is chosen, where training chose no other."""
TASKS_WITH_THRESHOLD = ("binary", "multilabel")


class ClassifyEndpoint:
    """Answers requests for predictions.

    Args:
        service: what all paths share.
        predictor: the model with its heads.
    """

    def __init__(self, service: Service, predictor: Predictor):
        self.service, self.predictor = service, predictor
        model, processor = predictor.model, predictor.processor
        self.batcher = Batcher(processor, model.device, predictor.of, service.config.max_batch)

    async def respond(self, call: Call) -> dict[str, object]:
        """Return the predictions for a request.

        Raises:
            RequestError: the request is refused.
        """
        rows = await self.service.threads.run(self._prepare, call)
        call.release()
        with ExitStack() as places:
            places.enter_context(self.service.admission.places(len(rows) - 1))
            try:
                predictions = await self.batcher.run(rows)
            except Exception as error:
                raise translate_engine_error(error) from error
        self.service.metrics.prompt_tokens.inc(count_tokens(rows))
        usage = {**make_usage(count_tokens(rows), 0), "prompt_tokens_details": None}
        data = [self._describe(index, by_head) for index, by_head in enumerate(predictions)]
        return {
            "id": make_id("classify"),
            "object": "list",
            "created": int(time.time()),
            "model": self.service.name,
            "data": data,
            "usage": usage,
        }

    def _prepare(self, call: Call) -> list[SampleInputs]:
        request = parse_inputs(ClassifyRequest, call)
        config = self.predictor.model.config
        return prepare_inputs(request, self.predictor.processor, config, self.service.config, config.suffix_ids)

    def _describe(self, index: int, by_head: dict[str, Prediction]) -> dict[str, object]:
        """Return the predictions of all heads for one prompt; at the top those of the first, as vLLM writes them."""
        heads = {head.name: describe_prediction(head, by_head[head.name]) for head in self.predictor.heads}
        settings = self.predictor.heads[0]
        first = by_head[settings.name]
        return {
            "index": index,
            "label": first.prediction if settings.labels else None,
            "probs": list(first.probabilities.values()),
            "num_classes": len(settings.labels),
            "heads": heads,
        }

    def close(self) -> None:
        """End the model's thread."""
        self.batcher.close()


def describe_prediction(head: HeadSettings, prediction: Prediction) -> dict[str, object]:
    """Return a head's prediction as JSON.

    `prediction` is the label, the list of labels that apply, or the number; `probabilities` has each label's;
    `threshold` is the least probability at which a label is chosen, for `multilabel` by label, null where the task
    has none.
    """
    threshold: object = None
    if head.task in TASKS_WITH_THRESHOLD:
        chosen = DEFAULT_THRESHOLD if head.threshold is None else head.threshold
        threshold = chosen
        if head.task == "multilabel":
            each = chosen if isinstance(chosen, list) else [chosen] * len(head.labels)
            threshold = dict(zip(map(str, head.labels), each, strict=True))
    return {
        "task": head.task,
        "prediction": prediction.prediction,
        "score": prediction.score,
        "probabilities": {str(label): value for label, value in prediction.probabilities.items()},
        "threshold": threshold,
    }
