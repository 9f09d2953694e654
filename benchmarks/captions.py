"""What a checkpoint knows about captioned images that it was not trained on.

    python benchmarks/captions.py CHECKPOINT --data val.json --image-folder images [--output report.json]

Prints the loss per supervised token with the images and with blank ones, the paired difference over samples with its
95% interval, how often an image's own caption has the lowest loss among ten, and ten answers. `vlm eval --metrics
loss,retrieval` gives the same figures; this adds answers beside references in one file.
"""

import argparse
import json
from pathlib import Path

from vlm import VisionLanguageModel
from vlm.config.dataset_schema import SourceConfig
from vlm.config.schema import InferenceConfig
from vlm.data.vision.images import open_media
from vlm.evaluation.bootstrap import scores_to_json
from vlm.evaluation.loss import last_reply_text
from vlm.evaluation.records import InferenceLosses, load_supervised_dataset, prepare_loss_metrics


def report(args: argparse.Namespace) -> dict:
    """Return all figures."""
    model = VisionLanguageModel.load(args.checkpoint, dtype=args.dtype)
    config = SourceConfig(path=args.data, image_folder=args.image_folder)
    data = load_supervised_dataset(model, config, max_frames=8)
    losses, scores = InferenceLosses(model, args.batch, 0), {}
    for metric in prepare_loss_metrics(data, ["loss", "retrieval"], args.ways).values():
        scores |= metric.compute(data, losses).scores
    answers = []
    for index in range(0, len(data), max(len(data) // args.answers, 1))[: args.answers]:
        sample = data.sample(index)
        answer = model.answer([sample.turns[:-1]], [open_media(sample)], InferenceConfig(max_new_tokens=40))[0]
        answers.append({"id": sample.id, "reference": last_reply_text(sample), "answer": answer})
    return {
        "checkpoint": str(args.checkpoint),
        "samples": len(data),
        "retrieval_ways": args.ways,
        **scores_to_json(scores),
        "answers": answers,
    }


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--image-folder", default=None)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ways", type=int, default=10)
    parser.add_argument("--answers", type=int, default=10)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    result = report(args)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
