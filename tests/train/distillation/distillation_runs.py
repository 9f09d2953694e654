"""A teacher and a narrower student on the tiny world, and the settings of short runs."""

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

KEY = "trainer.distillation"
STUDENT = [
    "trainer.learning_rate.language_model_learning_rate=1e-3", "trainer.max_steps=3", "trainer.num_samples=0",
    "trainer.train_sampling_strategy=sequential", "trainer.save_strategy=no",
]  # fmt: skip
EVALUATED = ["dataset.eval_split=0.25", "trainer.eval_strategy=epoch"]
STATES = [f"{KEY}.hidden_states_weight=1", f"{KEY}.image_features_weight=0.5"]
VOCABULARY = 100_000
"""More tokens than any vocabulary of the tests has."""


def train_teacher(train: Callable[..., Path], folder: Path) -> Path:
    """Finetune a model of the tiny parts; return its checkpoint."""
    words = ["trainer.max_steps=4", "trainer.seed=3", "trainer.learning_rate.language_model_learning_rate=1e-2",
             "trainer.num_samples=0", "trainer.save_strategy=no"]  # fmt: skip
    return train("finetune-smol", folder / "run", *words) / "final"


def save_narrow(world: Path, folder: Path) -> Path:
    """Save a language model half as wide as the tiny world's, with the same tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(world / "language_model")
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**shape, **ids, max_position_embeddings=256)).save_pretrained(folder)
    return folder
