"""What a checkpoint knows about captioned images that it was not trained on.

    python benchmarks/captions.py CHECKPOINT --data val.json --image-folder images [--output report.json]

Prints the loss per supervised token with the images and with blank ones, the paired difference over samples with its
95% interval, how often an image's own caption has the lowest loss among ten, and ten answers.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tqdm import tqdm

from vlm import VisionLanguageModel
from vlm.config.schema import DatasetConfig, InferenceConfig
from vlm.data.batching.collator import Collator
from vlm.data.dataset import BlankImageDataset, SampleDataset, load_dataset
from vlm.data.encoding.sample_encoder import SampleEncoder
from vlm.data.vision.images import open_media
from vlm.evaluation.loss import caption_retrieval, last_reply_text, row_losses


@torch.no_grad()
def losses(model: VisionLanguageModel, dataset: SampleDataset | BlankImageDataset, batch: int) -> torch.Tensor:
    """Return the summed loss and the number of supervised tokens of each sample: `(samples, 2)`."""
    collate = Collator(model.processor.tokenizer.pad_token_id)
    rows = []
    for start in tqdm(range(0, len(dataset), batch), "loss"):
        inputs = collate([dataset[i] for i in range(start, min(start + batch, len(dataset)))])
        inputs = {name: value.to(model.model.device) for name, value in inputs.items()}
        inputs["pixel_values"] = model.processor.normalise(inputs["pixel_values"])
        rows.append(torch.stack(row_losses(model.model(**inputs).logits, inputs["labels"]), dim=1).cpu())
    return torch.cat(rows)


def report(args: argparse.Namespace) -> dict:
    """Return all figures."""
    model = VisionLanguageModel.load(args.checkpoint, dtype=args.dtype)
    config = DatasetConfig(path=args.data, image_folder=args.image_folder)
    data = load_dataset(config, SampleEncoder(model.processor, 2048, truncate=False), evaluates=True)
    samples = [data.sample(index) for index in range(len(data))]
    real, blank = losses(model, data, args.batch), losses(model, BlankImageDataset(data), args.batch)
    gains = (blank[:, 0] - real[:, 0]) / real[:, 1]
    correct = caption_retrieval(model.model, model.processor, samples, ways=args.ways)
    answers = []
    for sample in samples[:: max(len(data) // args.answers, 1)][: args.answers]:
        images = open_media(sample)
        answer = model.answer([sample.turns[:-1]], [images], InferenceConfig(max_new_tokens=40))[0]
        answers.append({"id": sample.id, "reference": last_reply_text(sample), "answer": answer})
    return {
        "checkpoint": str(args.checkpoint),
        "samples": len(data),
        "loss": (real[:, 0].sum() / real[:, 1].sum()).item(),
        "blank_loss": (blank[:, 0].sum() / blank[:, 1].sum()).item(),
        "image_gain": gains.mean().item(),
        "image_gain_ci95": 1.96 * gains.std().item() / math.sqrt(len(gains)),
        "retrieval_ways": args.ways,
        "retrieval_accuracy": sum(correct) / len(correct),
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
