"""What `vlm --help` prints, read from the YAML files. Imports neither torch nor Hydra."""

from textwrap import fill

from vlm.config.packaged import group_names, packaged_names, read_run_description, run_names

USAGE = """\
vlm composes, trains and asks vision-language models.

  vlm -cn RUN dataset.path=RECORDS [key=value …]            train
  vlm launch --nproc 8 -- -cn RUN …                         train on several GPUs; vlm launch --help
  vlm submit --target slurm -cn RUN nodes=4 …               a job of it for a cluster; vlm submit --help
  vlm generate CHECKPOINT --image FILE --prompt TEXT        ask a trained model; of a file: --input, --output
  vlm chat CHECKPOINT --image FILE                          talk with a trained model
  vlm predict CHECKPOINT --image FILE --prompt TEXT         ask a trained head; of a file: --input, --output
  vlm eval CHECKPOINT --data RECORDS --metrics NAME,NAME    measure a trained model; or --tasks of lmms-eval
  vlm runs [FOLDER]                                         the runs below outputs/; vlm report RUN: a page of one
  vlm compare RUN RUN                                       settings, metrics, curves and answers of runs
  vlm compare-models BEFORE AFTER --data RECORDS            what a finetune gained and what it forgot
  vlm web                                                   a page: chat, predict, train, look through data
  vlm data TOOL …                                           download, convert, clean, stats, show; vlm data --help
  vlm models                                                what can be trained: parts, types of models, proofs
  vlm import SOURCE OUT                                     a LLaVA checkpoint as one of this framework
  vlm export CHECKPOINT OUT --format llava                  a checkpoint for transformers and vLLM; vlm export --help
  vlm verify CHECKPOINT --with ENGINE                       is what is served what was trained; vlm verify --help
  vlm merge-lora CHECKPOINT OUT                             an adapter and its base as one complete checkpoint
  vlm average CHECKPOINT CHECKPOINT --out FOLDER            the mean of several models' weights; vlm average --help
  vlm serve CHECKPOINT                                      a model as OpenAI's chat completions
  vlm push-to-hub CHECKPOINT --repo OWNER/NAME              a checkpoint on the Hub, for plain transformers

On several GPUs: vlm launch, or torchrun --nproc-per-node 8 -m vlm -cn RUN …, or deepspeed --module vlm -cn RUN …"""

HINTS = """\
Any key can be set (trainer.num_train_epochs=2), any group exchanged (model/language_model=qwen2.5-0.5b).
vlm -cn RUN --cfg job shows every key with its value and trains nothing; --config-dir FOLDER adds your YAML files."""


def overview() -> str:
    """Return the usage, the shipped runs with their purposes, and the groups with their choices."""
    runs = "\n".join(_format_entry(name, read_run_description(name), 26) for name in run_names())
    groups = "\n".join(
        _format_entry(group, ", ".join(packaged_names("vlm.config", group, ".yaml")), 24) for group in group_names()
    )
    return f"{USAGE}\n\nRuns\n{runs}\n\nGroups and their choices\n{groups}\n\n{HINTS}"


def _format_entry(name: str, text: str, width: int) -> str:
    """Return a name and its text in two columns."""
    lead = f"  {name:<{width - 2}}"
    return fill(text, 118, initial_indent=lead, subsequent_indent=" " * width, break_on_hyphens=False)
