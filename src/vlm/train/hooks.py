"""The methods of transformers' `Trainer` that training here overrides or calls, each with the reason.

A method that a release renames would still be overridden, but never called: the run would end with exit code 0, without
checks, measures or complete checkpoints. `@check_hooks` refuses such a release when the class is made. Methods without
an underscore can be renamed too, so they are in the list.
"""

from typing import TypeVar

from transformers import Trainer

from vlm.assembly.private_names import PrivateName, check_private_names

TRAINER = "transformers.trainer:Trainer"


def _hook(name: str, reason: str, *parameters: str) -> PrivateName:
    return PrivateName(TRAINER, name, reason, parameters)


PRIVATE_HOOKS = (
    _hook("_get_train_sampler", "samples are grouped by modality and length, or by the objective", "train_dataset"),
    _hook("_prepare_inputs", "pixels are normalised on the device, and copies do not wait for it", "inputs"),
    _hook("_track_num_input_tokens", "the tokens of all packed rows are counted", "inputs"),
    PrivateName(TRAINER, "loss_is_scaled_for_ga", "losses of packed rows are parts of their step's (set)"),
    _hook("_get_grad_norm", "the gradient norm says whether an update is applied", "model", "grad_norm"),
    _hook("_save_checkpoint", "a checkpoint is whole before older ones are removed", "model", "trial"),
    _hook("_determine_best_metric", "the best checkpoint is kept by `trainer.keep_best`", "metrics", "trial"),
    _hook("_get_output_dir", "checkpoints are written aside", "trial"),
    _hook("_save_optimizer_and_scheduler", "states are hashed, and DeepSpeed leaves frozen weights out", "output_dir"),
    _hook("_load_from_checkpoint", "a checkpoint has only the weights that train", "resume_from_checkpoint", "model"),
    _hook("_load_rng_state", "random numbers of another number of ranks are not taken", "checkpoint"),
    _hook(
        "_prepare_for_training",
        "DeepSpeed resumes from checkpoints without frozen parameters",
        *("max_steps", "train_dataloader", "resume_from_checkpoint"),
    ),
    _hook(
        "_maybe_log_save_evaluate",
        "an evaluation that was due when a run was saved is made when it is resumed (called)",
        *("tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time"),
    ),
    PrivateName(TRAINER, "_run_epoch", "a run that is resumed at its last step trains no further one"),
    _hook("_get_num_items_in_batch", "tokens count as often as their reply's weight says", "batch_samples", "device"),
    _hook("_defer_fsdp_gradient_reduction", "FSDP2 reduces gradients after each micro-batch"),
)
"""The private methods, and an attribute. Whoever can do without one should."""

PUBLIC_HOOKS = (
    _hook("train", "signals end a run with a checkpoint", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    _hook("create_optimizer", "each part has parameter groups of its own", "model"),
    _hook("get_decay_parameter_names", "biases and norms have no weight decay (called)", "model"),
    _hook("autocast_smart_context_manager", "the run's precision", "cache_enabled"),
    _hook("compute_loss_context_manager", "the run's precision (called)"),
    _hook(
        "training_step",
        "packed rows have an attention of their own, and come one by one",
        "model",
        "inputs",
        "num_items_in_batch",
    ),
    _hook("compute_loss", "the objective's loss", "model", "inputs", "return_outputs", "num_items_in_batch"),
    _hook("get_batch_samples", "batches are timed and counted", "epoch_iterator", "num_batches", "device"),
    _hook("get_train_dataloader", "batches are packed, and streams are shared out to ranks beforehand"),
    _hook("evaluate", "the objective's metrics", "eval_dataset", "ignore_keys", "metric_key_prefix"),
    _hook("log", "speed and each part's learning rate", "logs", "start_time"),
    _hook("floating_point_ops", "operations are counted in the speed of a run", "inputs"),
    _hook("save_model", "processor and base are saved with the model", "output_dir", "_internal_call"),
)

T = TypeVar("T", bound=type[Trainer])


def check_hooks(trainer: T) -> T:
    """Return a subclass of `Trainer`; raise ImportError if transformers lost a hook or gave it other parameters."""
    check_private_names((*PRIVATE_HOOKS, *PUBLIC_HOOKS))
    listed = {hook.name for hook in (*PRIVATE_HOOKS, *PUBLIC_HOOKS)}
    own = {name for kind in trainer.__mro__[: trainer.__mro__.index(Trainer)] for name in vars(kind)}
    unlisted = {name for name in own - listed if hasattr(Trainer, name) and not name.startswith("__")}
    assert not unlisted, f"{sorted(unlisted)} of Trainer are overridden, but not in the list of hooks"
    return trainer
