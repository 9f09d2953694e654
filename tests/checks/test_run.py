"""Every refusal of the checks: the full key, what was given, what is allowed. In this process, to the letter."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.fixtures import check_config, compose_config
from vlm.checks.fields import ConfigError, format_value
from vlm.checks.run import UNSUPPORTED, check_overridden_rates
from vlm.config.packaged import group_names, packaged_names, run_names
from vlm.train.objectives.table import make_objective

CHOICES = {
    "model.visual_encoder.feature_strategy": "patch, cls+patch, cls, full",
    "model.visual_encoder.quantization": "null, 8bit, 4bit",
    "model.language_model.quantization": "null, 8bit, 4bit",
    "trainer.lora.bias": "none, lora_only, all",
    "trainer.lora.init": "default, gaussian, orthogonal",
    "model.attn_implementation": "auto, flash_attention_2, sdpa, flex_attention, eager",
    "trainer.loss_average": "token, micro_batch",
    "trainer.train_sampling_strategy": "random, sequential, group_by_modality_length, group_by_modality_blocks",
    "dataset.supervise": "replies, llava-onevision",
    "dataset.image_mode": "null, square, pad, native",
    "dataset.alpha_background": "null, white, black, grey, drop",
    "dataset.over_length": "error, skip, truncate, split",
    "dataset.on_bad_sample": "error, skip",
}
"""What each closed list says is allowed."""

LINEAR = ["model/connector=linear"]
EVAL_SPLIT = "a share from 0 to below 1, or null, is needed"
NEEDS_RATE = "a positive number is needed, because trainer.unfreeze"
REFUSALS = {
    "format": (
        ["dataset.format=lava"],
        "dataset.format=lava: allowed are llava, messages, caption, question, head, pair, preference, labelled, ",
    ),
    "template": (["dataset.template=v2"], "dataset.template=v2: allowed are "),
    "template file": (["dataset.template=no/own.jinja"], "dataset.template=no/own.jinja: no such file (seen from "),
    "an old name": (
        ["trainer.gradient_checkpointing=false"],
        "trainer.gradient_checkpointing=false: it is called trainer.activation_checkpointing now",
    ),
    "connector": (
        ["model.connector.type=mpl"],
        "model.connector.type=mpl: allowed are c_abstractor, identity, ldp, ldp_v2, linear, mlp, pixel_shuffle, "
        "pooling, qformer, resampler, or package.module:Class for your own",
    ),
    "connector's option": (
        [*LINEAR, "+model.connector.options.num_layers=3"],
        "model.connector.options.num_layers=3: linear does not take it; model.connector.options.num_layers=null leaves "
        "it out. Allowed: bias, input_norm",
    ),
    "no layer": (
        ["model.visual_encoder.feature_layer=[]"],
        "model.visual_encoder.feature_layer=[]: a whole number is needed, a list of them, or null for the encoder's",
    ),
    "half a layer": (["model.visual_encoder.feature_layer=1.5"], "model.visual_encoder.feature_layer=1.5: a whole num"),
    "a layer's name": (
        ["model.visual_encoder.feature_layer=[-2,last]"],
        "model.visual_encoder.feature_layer=[-2, 'last']: a whole",
    ),
    "no size": (["model.visual_encoder.image_size=0"], "model.visual_encoder.image_size=0: at least 1, or null"),
    "a strategy of an encoder beside": (
        ["model.visual_encoder.extra_encoders=[{hf_name: a, feature_strategy: patches}]"],
        "model.visual_encoder.extra_encoders.0.feature_strategy=patches: allowed are patch, cls+patch, cls, full",
    ),
    "a folder of an encoder beside": (
        ["model/visual_encoder=dinov2-siglip", "model.visual_encoder.extra_encoders.0.hf_name=./no/where"],
        "model.visual_encoder.extra_encoders.0.hf_name=./no/where: no such folder (seen from ",
    ),
    "a size of an encoder beside": (
        ["model/visual_encoder=dinov2-siglip", "model.visual_encoder.extra_encoders.0.image_size=-1"],
        "model.visual_encoder.extra_encoders.0.image_size=-1: at least 1, or null, is needed",
    ),
    "a grid of tiles": (["model.anyres.grids=[[1,2],[3]]"], "model.anyres.grids: [3] is not a grid; [rows, columns]"),
    "tiles without grids": (
        ["model.anyres.max_tiles=9"],
        "model.anyres: max_tiles and tile_several need grids, as in model/anyres=llava-next",
    ),
    "tiles, no number of them": (
        ["model/anyres=llava-next", "model.anyres.max_tiles=0"],
        "model.anyres.max_tiles=0: at least 1, or null, is needed",
    ),
    "tiles and padding": (
        ["model/anyres=llava-next", "dataset.image_mode=pad"],
        "dataset.image_mode=pad: with model.anyres, an image is squashed to a square as a whole and its tiles are ",
    ),
    "tiles of a whole model": (
        ["model/anyres=llava-onevision", "model.hf_name=llava-hf/llava-1.5-7b-hf"],
        "model.anyres.grids: model.hf_name=llava-hf/llava-1.5-7b-hf prepares images itself; choose model/anyres=none",
    ),
    "format's option": (
        ["dataset.format=caption", "dataset.options.key=a"],
        "dataset.options.key: caption does not take it; allowed are image_key, caption_key, prompt",
    ),
    "a path and sources": (
        ["dataset.sources.a.path=no.json"],
        "dataset.path and dataset.sources: choose one (dataset.path=null leaves it out)",
    ),
    "a source's records": (
        ["dataset.path=null", "dataset.sources.a.path=no.json"],
        "dataset.sources.a.path=no.json: no such file (seen from ",
    ),
    "a source's weight": (
        ["dataset.path=null", "dataset.sources.a={path: tests, weight: 0}"],
        "dataset.sources.a.weight=0.0: a number above 0 is needed",
    ),
    "a source's template": (
        ["dataset.path=null", "dataset.sources.a={path: tests, template: v2}"],
        "dataset.sources.a.template=v2: allowed are ",
    ),
    "neither a path nor sources": (
        ["dataset.path=null"],
        "dataset.path: a value is needed: the file of your records, such as train.json (docs/data.md)",
    ),
    "no kind of records": (
        ["dataset.path=pyproject.toml"],
        "dataset.path=pyproject.toml: a file named *.json, *.jsonl, *.ndjson, *.csv, *.tsv, *.parquet, *.arrow, *.tar",
    ),
    "an address": (
        ["dataset.path=https://example.com/a.json"],
        "dataset.path=https://example.com/a.json: the only web addresses that are read are http(s)://….tar",
    ),
    "a shell": (
        ['dataset.path="pipe:cat a.tar"'],
        "dataset.path=pipe:cat a.tar: a shell would run this; dataset.allow_pipe=true allows it",
    ),
    "an endless stream": (
        ["dataset.streaming=true"],
        "dataset.streaming=true: a stream has no end; set trainer.max_steps",
    ),
    "a part of a stream": (
        ["dataset.streaming=true", "trainer.max_steps=1", "dataset.max_samples=5"],
        "dataset.max_samples: it does not work with dataset.streaming=true; set trainer.max_steps instead",
    ),
    "holding out of a stream": (
        ["dataset.streaming=true", "trainer.max_steps=1", "dataset.eval_split=0.5"],
        "dataset.streaming=true: nothing can be held out of a stream; give dataset.eval_path",
    ),
    "comparing a stream": (
        ["dataset.streaming=true", "trainer.max_steps=1", "dataset.overlap=warn"],
        "dataset.overlap=warn: a stream cannot be compared before it is read; choose allow, or streaming=false",
    ),
    "grouping a stream": (
        [
            "dataset.streaming=true",
            "trainer.max_steps=1",
            "trainer.packing=false",
            "trainer.train_sampling_strategy=group_by_modality_length",
        ],
        "trainer.train_sampling_strategy=group_by_modality_length: a stream cannot be grouped; choose random",
    ),
    "frames": (["dataset.max_frames=0"], "dataset.max_frames=0: at least 1 is needed"),
    "skipped share": (["dataset.max_skipped=2"], "dataset.max_skipped=2.0: a share from 0 to 1 is needed"),
    "samples": (["dataset.max_samples=0"], "dataset.max_samples=0: at least 1, or null, is needed"),
    "records": (["dataset.path=no.json"], "dataset.path=no.json: no such file (seen from "),
    "evaluation records": (["dataset.eval_path=no.json"], "dataset.eval_path=no.json: no such file (seen from "),
    "pictures": (["dataset.image_folder=no"], "dataset.image_folder=no: no such folder (seen from "),
    "evaluation pictures": (["dataset.eval_image_folder=no"], "dataset.eval_image_folder=no: no such folder (seen"),
    "encoder's folder": (
        ["model.visual_encoder.hf_name=./no"],
        "model.visual_encoder.hf_name=./no: no such folder (seen from ",
    ),
    "language model's folder": (
        ["model.language_model.hf_name=/no/such"],
        "model.language_model.hf_name=/no/such: no such folder (seen from ",
    ),
    "checkpoint": (["trainer.from_pretrained=./no"], "trainer.from_pretrained=./no: no such folder (seen from "),
    "what to resume": (
        ["trainer.resume_from_checkpoint=no"],
        "trainer.resume_from_checkpoint=no: allowed are auto, never, or the folder of a checkpoint (seen from ",
    ),
    "resuming a run without a name": (
        ["trainer.resume_from_checkpoint=true"],
        "trainer.resume_from_checkpoint=true: set trainer.output_dir to the run to resume",
    ),
    "beginning with accepted changes": (
        ["trainer.resume_from_checkpoint=never", "trainer.resume_changes=accept"],
        "trainer.resume_from_checkpoint=never and trainer.resume_changes=accept: a new run has no earlier settings",
    ),
    "an order that is not repeated": (
        ["trainer.accelerator_config={use_seedable_sampler: false}"],
        "trainer.accelerator_config.use_seedable_sampler=false: a run that resumes within an epoch would read ",
    ),
    "what becomes of changes": (
        ["trainer.resume_changes=ignore"],
        "trainer.resume_changes=ignore: allowed are refuse, accept",
    ),
    "nothing trains": (
        ["trainer.unfreeze.train_connector=false"],
        "nothing trains: set one of trainer.unfreeze.train_vision_model, trainer.unfreeze.train_connector, "
        "trainer.unfreeze.train_language_model to true",
    ),
    "no rate": (
        ["trainer.unfreeze.train_vision_model=true"],
        f"trainer.learning_rate.visual_encoder_learning_rate=null: {NEEDS_RATE}.train_vision_model=true",
    ),
    "two ways to shard": (
        ["trainer/sharding=fsdp2", "trainer/deepspeed=zero2"],
        "trainer.sharding=fsdp2 and trainer.deepspeed: both shard the model; choose one (trainer/deepspeed=none)",
    ),
    "sharding": (["trainer.sharding=fsdp"], "trainer.sharding=fsdp: allowed are null, fsdp2"),
    "sharded in fp16": (
        ["trainer.sharding=fsdp2", "trainer.fp16=true"],
        "trainer.sharding=fsdp2 and trainer.fp16=true: ",
    ),
    "sharded and compiled": (
        ["trainer.sharding=fsdp2", "trainer.torch_compile=true"],
        "trainer.sharding=fsdp2 and trainer.torch_compile=true: ",
    ),
    "sharded bits": (
        ["trainer.sharding=fsdp2", "model.language_model.quantization=4bit"],
        "model.language_model.quantization=4bit and trainer.sharding=fsdp2: quantised weights are not sharded",
    ),
    "sharded rows": (
        [
            "trainer.sharding=fsdp2",
            "model.language_model.new_tokens=['<x>']",
            "trainer.learning_rate.language_model_learning_rate=1e-4",
        ],
        "model.language_model.new_tokens=['<x>'] and trainer.sharding=fsdp2: rows of an embedding cannot train",
    ),
    "sharded optimiser": (
        ["trainer.sharding=fsdp2", "trainer.optim=muon"],
        "trainer.optim=muon and trainer.sharding=fsdp2: its states differ in shape from the weights, or need whole",
    ),
    "rate of zero": (
        ["trainer.learning_rate.connector_learning_rate=0"],
        f"trainer.learning_rate.connector_learning_rate=0.0: {NEEDS_RATE}.train_connector=true",
    ),
    "precisions": (
        ["trainer.bf16=true", "trainer.fp16=true"],
        "trainer.bf16=true and trainer.fp16=true: choose one",
    ),
    "average": (
        ["trainer.average_tokens_across_devices=false"],
        "trainer.average_tokens_across_devices=false: set trainer.loss_average instead",
    ),
    "DeepSpeed": (
        ["trainer.deepspeed=zero9"],
        "trainer.deepspeed=zero9: allowed are zero0, zero1, zero2, zero3 or the path of a JSON file",
    ),
    "share above one": (["dataset.eval_split=1.5"], f"dataset.eval_split=1.5: {EVAL_SPLIT}"),
    "share below zero": (["dataset.eval_split=-0.5"], f"dataset.eval_split=-0.5: {EVAL_SPLIT}"),
    "evaluating on nothing": (
        ["trainer.eval_strategy=epoch"],
        "trainer.eval_strategy=epoch: give dataset.eval_path=FILE or a share: dataset.eval_split=0.05",
    ),
    "not evaluating on something": (
        ["dataset.eval_split=0.5"],
        "dataset.eval_split is given, but nothing is evaluated: add trainer.eval_strategy=epoch, or leave "
        "dataset.eval_split out",
    ),
    "temperature": (
        ["inference.temperature=-1"],
        "inference.temperature=-1.0: 0 (greedy) or more is needed",
    ),
    "top_p": (["inference.top_p=0"], "inference.top_p=0.0: a share above 0, at most 1 is needed"),
    "beams": (["inference.num_beams=0"], "inference.num_beams=0: at least 1 is needed"),
    "length": (["inference.max_new_tokens=0"], "inference.max_new_tokens=0: at least 1 is needed"),
    "scheduler": (["trainer.lr_scheduler_type=cosin"], "trainer.lr_scheduler_type=cosin: allowed are linear, cosine,"),
    "optimiser": (["trainer.optim=adam"], "trainer.optim=adam: allowed are adamw_torch, "),
    "Muon under DeepSpeed": (
        ["trainer.optim=muon", "trainer.deepspeed=zero2"],
        "trainer.optim=muon and trainer.deepspeed: Muon needs whole matrices, which DeepSpeed flattens",
    ),
    "a peak of nothing": (["trainer.peak_tflops=0"], "trainer.peak_tflops=0.0: a number above 0, or null, is needed"),
    "metrics": (["trainer.eval_metrics=[anls,meteor]"], "trainer.eval_metrics=meteor: allowed are exact_match, vqa_"),
    "what to do on a full disk": (
        ["trainer.on_save_error=pray"],
        "trainer.on_save_error=pray: allowed are stop, continue",
    ),
    "saving in the background under DeepSpeed": (
        ["trainer.async_save=true", "trainer.deepspeed=zero2"],
        "trainer.async_save=true and trainer.deepspeed: DeepSpeed writes its files while the run waits; leave one",
    ),
    "the best of nothing": (
        ["trainer.keep_best=eval_loss"],
        "trainer.keep_best=eval_loss: this run has no evaluation; set trainer.eval_strategy to epoch or steps",
    ),
    "the best by what is not measured": (
        ["trainer.keep_best=anls", "trainer.eval_strategy=epoch", "dataset.eval_split=0.5"],
        "trainer.keep_best=anls: no evaluation measures it; allowed are eval_blank_loss, eval_image_gain, eval_loss",
    ),
    "a direction of nothing": (
        ["trainer.greater_is_better=true"],
        "trainer.greater_is_better=true: trainer.keep_best names no metric",
    ),
    "the best under transformers' names": (
        ["trainer.save_strategy=best"],
        "trainer.save_strategy=best: name a metric in trainer.keep_best, which saves at each new best evaluation",
    ),
    "the metric of the best under transformers' name": (
        ["trainer.metric_for_best_model=loss"],
        "trainer.metric_for_best_model=loss: it is called trainer.keep_best here",
    ),
    "a run directory below a file": (
        ["trainer.output_dir=pyproject.toml/run"],
        f"trainer.output_dir=pyproject.toml/run: {Path.cwd() / 'pyproject.toml'} is a file; a folder is needed",
    ),
}
"""Overrides -> how the message begins."""


@pytest.fixture
def records(tmp_path: Path) -> Path:
    (tmp_path / "records.json").write_text("[]")
    return tmp_path / "records.json"


def refused(records: Path, *overrides: str) -> str:
    config = compose_config("pretrain-smol", [f"dataset.path={records}", *overrides])
    with pytest.raises(ConfigError) as error:
        check_config(config)
    return str(error.value)


@pytest.mark.parametrize(("overrides", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_says_the_key_the_value_and_what_is_allowed(records: Path, overrides: list[str], message: str):
    assert refused(records, *overrides).startswith(message)


def test_evaluation_records_that_nothing_evaluates_are_refused_with_both_ways_out(records: Path):
    message = refused(records, f"dataset.eval_path={records}")
    assert message == (
        "dataset.eval_path is given, but nothing is evaluated: add trainer.eval_strategy=epoch, or leave "
        "dataset.eval_path out"
    )


def test_shards_are_streamed_and_not_evaluated_on(records: Path, tmp_path: Path):
    (tmp_path / "0.tar").touch()
    said = refused(records, f"dataset.eval_path={tmp_path}", "trainer.eval_strategy=epoch")
    assert (
        said
        == f"dataset.eval_path={tmp_path}: tar shards are for training only; give evaluation records in another form"
    )
    said = refused(records, f"dataset.path={tmp_path / '0.tar'}")
    assert said.endswith("tar shards can only be streamed; set dataset.streaming=true")


@pytest.mark.parametrize("key", CHOICES)
def test_closed_lists_are_listed(records: Path, key: str):
    assert refused(records, f"{key}=nonsense") == f"{key}=nonsense: allowed are {CHOICES[key]}"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_says_what_to_do(records: Path, name: str):
    value = {"fsdp": "full_shard", "label_smoothing_factor": "0.1"}.get(name, "true")
    assert refused(records, f"trainer.{name}={value}") == f"trainer.{name}={value}: {UNSUPPORTED[name]}"


def test_ligers_kernels_are_no_refusal(records: Path):
    check_config(compose_config("pretrain-smol", [f"dataset.path={records}", "trainer.use_liger_kernel=true"]))


def test_a_run_directory_given_for_its_model_gets_a_hint(records: Path, tmp_path: Path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    message = refused(records, f"trainer.from_pretrained={tmp_path / 'run'}")
    assert message.endswith(f"it is a run directory, and its model is {tmp_path / 'run' / 'final'}")


def test_evaluation_records_and_a_share_contradict(records: Path):
    message = refused(records, f"dataset.eval_path={records}", "dataset.eval_split=0.1")
    assert message == "dataset.eval_path and dataset.eval_split: choose one"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.connector.type=my_package.my_module:MyConnector"],
        ["+model.connector.options.depth=3", "model.connector.type=mine:Connector"],
        ["model.connector.options.num_layers=3", "model.connector.options.input_norm=null"],
        ["model/connector=identity", "model.connector.options.input_norm=null"],
        ["dataset.template=tokenizer"],
        ["dataset.template=null", "dataset.image_mode=pad"],
        ["trainer.from_pretrained=somebody/some-model"],
        ["trainer.resume_from_checkpoint=false"],
        ["trainer.eval_strategy=epoch", "dataset.eval_split=0.1", "trainer.keep_best=eval_loss"],
        ["trainer.eval_strategy=epoch", "dataset.eval_split=0.1", "trainer.keep_best=retrieval",
         "trainer.eval_metrics=[retrieval]", "trainer.greater_is_better=true"],
        ["trainer.resume_from_checkpoint=never"],
        ["trainer.lr_scheduler_type=greedy", "trainer.metric_for_best_model=loss"],
        ["trainer.resume_from_checkpoint=true", "trainer.output_dir=new"],
        ["trainer.resume_changes=accept"],
        ["trainer.eval_strategy=epoch", "dataset.eval_split=0.1"],
        ["trainer.deepspeed=zero3"],
        ["trainer/sharding=fsdp2"],
        ["trainer.sharding=fsdp2", "trainer.optim=my_package.my_module:Optimizer"],
        ["trainer.sharding=fsdp2", "trainer/unfreeze=all", "trainer/learning_rate=smol-finetune",
         "model.language_model.new_tokens=['<x>']", "trainer.learning_rate.visual_encoder_learning_rate=1e-6"],
        ["trainer.optim=muon"],
        ["trainer.optim=my_package.my_module:Optimizer", "trainer.deepspeed=zero2"],
        ["trainer/deepspeed=zero2", "trainer/unfreeze=all", "trainer/learning_rate=smol-finetune",
         "trainer.learning_rate.visual_encoder_learning_rate=1e-6"],
    ],
)  # fmt: skip
def test_what_can_be_run_passes(records: Path, overrides: list[str]):
    check_config(compose_config("pretrain-smol", [f"dataset.path={records}", *overrides]))


@pytest.mark.parametrize("word", ["momentum=0.9,ns_steps=4", "'momentum=0.9,ns_steps=4'"])
def test_options_of_an_optimiser_need_no_quotes(word: str):
    config = compose_config("pretrain-smol", ["dataset.path=a.json", f"trainer.optim_args={word}"])
    assert config.trainer.optim_args == "momentum=0.9,ns_steps=4"


def test_packaged_names():
    assert "pretrain-llava" in run_names()
    assert "base" not in run_names()
    assert {"model/connector", "trainer/deepspeed"} <= set(group_names())
    assert "zero3" in packaged_names("vlm.config", "trainer/deepspeed", ".yaml")


@pytest.mark.parametrize(("value", "text"), [(None, "null"), (True, "true"), (1, "1"), (0.0, "0.0"), ("x", "x")])
def test_values_are_shown_as_yaml_writes_them(value: object, text: str):
    assert format_value(value) == text


def test_what_a_run_that_was_killed_left_behind_blocks_nothing(records: Path, tmp_path: Path):
    """A folder of a first save that was not ended, a damaged one, one of another name."""
    for name in ("unfinished/checkpoint-1", "checkpoint-1", "checkpoint-2.damaged", "checkpoint-best"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-2.damaged" / "manifest.json").touch()
    config = compose_config("pretrain-smol", [f"dataset.path={records}", f"trainer.output_dir={tmp_path / 'run'}"])
    check_config(config)


@pytest.mark.parametrize("word", ["eval_accuracy", "f1", "eval_loss"])
def test_the_best_of_a_head_is_by_one_of_its_metrics(records: Path, word: str):
    words = ["model.hf_name=null", f"dataset.path={records}", "dataset.format=labelled", "dataset.eval_split=0.5",
             "dataset.options.label_key=a", "trainer.eval_strategy=epoch"]  # fmt: skip
    check_config(compose_config("head-binary", [*words, f"trainer.keep_best={word}"]))
    with pytest.raises(ConfigError, match=r"trainer\.keep_best=mae: no evaluation measures it; allowed are eval_acc"):
        check_config(compose_config("head-binary", [*words, "trainer.keep_best=mae"]))


RATE = "trainer.learning_rate.visual_encoder_learning_rate"


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        ([f"{RATE}=1e-5"], True),
        (["trainer.weight_decay.visual_encoder_weight_decay=0.1"], True),
        (["trainer.learning_rate.head_learning_rate=1e-3"], True),
        ([f"{RATE}=null"], False),
        ([f"{RATE}=1e-5", "trainer.unfreeze.train_vision_model=true"], False),
        ([f"{RATE}=1e-5", "trainer.lora.visual_encoder.r=4"], False),
        (["trainer/learning_rate=head"], False),  # a YAML may hold rates for runs that train the part
    ],
    ids=str,
)
def test_a_rate_of_a_frozen_part_is_refused_where_the_command_line_sets_it(
    records: Path, words: list[str], is_refused: bool
):
    config = compose_config("pretrain-smol", [f"dataset.path={records}", *words])
    keys = [word.partition("=")[0].replace("/", ".") for word in words]
    refusal = pytest.raises(ConfigError, match=r"would have no effect, since the .* is frozen")
    with refusal if is_refused else nullcontext():
        check_overridden_rates(config, make_objective(config), keys)
