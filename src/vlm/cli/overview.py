"""What `vlm` and `vlm --help` print, read from the YAML files. Imports neither torch nor Hydra."""

from textwrap import fill

from vlm.config.packaged import group_names, packaged_names, read_run_summary, run_names

FIRST_STEPS = """\
vlm trains vision-language models: from a visual encoder, a connector and a language model, or from a whole model of
the Hugging Face Hub.

Train     vlm -cn pretrain-smol dataset.path=captions.json dataset.image_folder=images
Ask       vlm generate outputs/RUN/final --image cat.png --prompt "What is this?"
Measure   vlm eval outputs/RUN/final --data val.json --image-folder images
Look      vlm data show -cn pretrain-smol dataset.path=captions.json dataset.image_folder=images
Publish   vlm push-to-hub outputs/RUN/final --repo OWNER/NAME

vlm --help            all commands, runs and parts
vlm COMMAND --help    one command, with examples
vlm doctor            what is installed here, and what is missing

New here? README.md trains a small model in five minutes; docs/README.md lists the guides."""
"""What `vlm` alone prints."""

USAGE = """\
vlm trains, runs and publishes vision-language models.

Train
  vlm -cn RUN dataset.path=RECORDS [key=value …]            train a run; the runs are listed below
  vlm check -cn RUN dataset.path=RECORDS …                  before training: memory, time, data, likely problems
  vlm watch FOLDER                                          follow a run while it trains, from its files
  vlm runs [FOLDER]                                         list runs with their state and results
  vlm compare FOLDER FOLDER …                               compare runs: settings, curves, metrics, answers
  vlm report FOLDER                                         write report.html of a run again
  vlm launch --nproc 8 -- -cn RUN …                         train on several GPUs or machines
  vlm submit --target slurm -cn RUN nodes=4 …               write a job file for a cluster

Use a model
  vlm generate CHECKPOINT --image FILE --prompt TEXT        answer a question, or all questions of a file
  vlm chat CHECKPOINT --image FILE                          chat with a model
  vlm predict CHECKPOINT --image FILE --prompt TEXT         predict with a head, for a prompt or a file
  vlm serve CHECKPOINT                                      serve a model with OpenAI's API
  vlm web                                                   open a page to chat, predict, train and browse data

Measure
  vlm eval CHECKPOINT --data RECORDS --metrics NAME,NAME    evaluate on records or on lmms-eval tasks
  vlm compare-models BEFORE AFTER --data RECORDS            show what a finetune gained and forgot
  vlm verify CHECKPOINT --with ENGINE                       check that another engine gives the same answers

Data and models
  vlm data TOOL …                                           download, convert, clean, count and look at records
  vlm models [NAME]                                         list parts and models that can be trained
  vlm import SOURCE OUT                                     convert a LLaVA checkpoint to one of this framework
  vlm export CHECKPOINT OUT --format llava                  convert a checkpoint for vLLM, llama.cpp, onnxruntime …
  vlm merge-lora CHECKPOINT OUT                             merge an adapter into its base
  vlm average CHECKPOINT CHECKPOINT --out FOLDER            average the weights of several checkpoints
  vlm push-to-hub CHECKPOINT --repo OWNER/NAME              publish a checkpoint on the Hugging Face Hub

Set up
  vlm doctor                                                show what is installed, for bug reports
  vlm completion bash                                       print the script that completes commands with TAB

Each command explains itself: vlm COMMAND --help. torchrun and deepspeed start runs too:
torchrun --nproc-per-node 8 -m vlm -cn RUN …; deepspeed --module vlm -cn RUN …"""

HINTS = """\
Set any key (trainer.num_train_epochs=2) and choose in any group (model/language_model=qwen2.5-0.5b).
vlm -cn RUN --help describes a run; --cfg job prints its keys, without training. --config-dir FOLDER adds your runs."""

MAX_NAME_WIDTH = 28
"""The longest name that has its text next to it; the text of a longer one begins on the next line."""


def overview() -> str:
    """Return the usage, the shipped runs with their purposes, and the groups with their choices."""
    runs = "\n".join(format_entry(name, read_run_summary(name)) for name in run_names())
    groups = "\n".join(
        format_entry(group, ", ".join(packaged_names("vlm.config", group, ".yaml"))) for group in group_names()
    )
    return f"{USAGE}\n\nRuns\n{runs}\n\nGroups and their choices\n{groups}\n\n{HINTS}"


def format_entry(name: str, text: str) -> str:
    """Return a name and its text in two columns, with two blanks between them at least."""
    indent = " " * (MAX_NAME_WIDTH + 4)
    lead = f"  {name:<{MAX_NAME_WIDTH}}  "
    if len(name) > MAX_NAME_WIDTH:
        return f"  {name}\n" + fill(text, 118, initial_indent=indent, subsequent_indent=indent)
    return fill(text, 118, initial_indent=lead, subsequent_indent=indent, break_on_hyphens=False)
