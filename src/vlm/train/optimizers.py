"""Optimisers: one of transformers', Muon, or a class of the user's own, always over the parts' parameter groups.

A part's learning rate and weight decay are in its groups, see `vlm.train.parts.parameter_groups`; an optimiser gets
these groups and nothing of the model. Imports no trainer.
"""

import ast
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from vlm.config.choices import MUON
from vlm.config.named import import_named, is_custom_name
from vlm.config.schema import HEAD
from vlm.train.parts import Part, parameter_groups, token_embedding_names

Group = dict[str, Any]
"""A parameter group of torch: `params` (tensors), `lr`, `weight_decay`, and ours: `name`."""


def make_optimizer(
    args: TrainingArguments, model: PreTrainedModel, parts: list[Part], decayed: Collection[str]
) -> Optimizer:
    """Return the optimiser of a run.

    Args:
        args: the run's arguments: the optimiser's name and settings (`optim`, `optim_args`, `adam_beta1` …).
        model: the model, not wrapped.
        parts: the model's parts.
        decayed: full names of the parameters that weight decay applies to.

    Raises:
        ValueError: the optimiser would lose the parts' groups, or what the user named makes none.
    """
    groups = parameter_groups(parts, decayed)
    name = args.optim.value if isinstance(args.optim, OptimizerNames) else args.optim
    if name == MUON:
        return make_muon(groups, model, parts, args)
    if is_custom_name(name):
        return _make_custom(name, groups, args)
    kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if not isinstance(kind, type) or {"model", "optimizer_dict"} & kwargs.keys():
        raise ValueError(
            f"trainer.optim={name}: it updates all parameters at one learning rate, and each part has its own. "
            "Choose another, such as adamw_torch_fused."
        )
    if (theirs := kwargs.pop("params", None)) is not None:  # low-rank optimisers treat some layers otherwise
        groups = _intersect_groups(groups, theirs)
    return kind(groups, **kwargs)


def _intersect_groups(groups: list[Group], others: list[Group]) -> list[Group]:
    """Divide groups further by others, whose settings they take over; settings that both have stay as they are."""
    divided = []
    for group in groups:
        for other in others:
            ids = set(map(id, other["params"]))
            if params := [parameter for parameter in group["params"] if id(parameter) in ids]:
                divided.append({**other, **group, "params": params})
    return divided


def _make_custom(name: str, groups: list[Group], args: TrainingArguments) -> Optimizer:
    """Return what the user's class makes of the groups.

    Its keyword parameters come from `trainer.optim_args`; `betas` and `eps` from `trainer.adam_…` where it has them.
    """
    make: Callable[..., object] = import_named(name, "trainer.optim")  # pyright: ignore[reportAssignmentType] - called
    parameters = inspect.signature(make).parameters
    defaults = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    kwargs = {key: value for key, value in defaults.items() if key in parameters} | parse_options(args.optim_args)
    try:
        optimizer = make(groups, **kwargs)
    except TypeError as error:
        raise ValueError(f"trainer.optim={name}, trainer.optim_args={args.optim_args}: {error}") from error
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"trainer.optim={name}: it returned a {type(optimizer).__name__}; a torch.optim.Optimizer is needed"
        )
    return optimizer


def parse_options(text: str | None) -> dict[str, object]:
    """Return the options in `trainer.optim_args`, `key=value,key=value`; values are Python literals, else strings.

    Raises:
        ValueError: a word is no `key=value`.
    """
    options: dict[str, object] = {}
    for word in (text or "").replace(" ", "").split(","):
        key, equals, value = word.partition("=")
        if word and not equals:
            raise ValueError(f"trainer.optim_args={text}: {word} is not of the form key=value")
        try:
            options |= {key: ast.literal_eval(value)} if word else {}
        except (ValueError, SyntaxError):
            options[key] = value
    return options


class MuonWithAdamW(Optimizer):
    """Muon for the matrices of hidden layers, AdamW for everything else, as one optimiser.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum M of a matrix W by the
    nearest orthogonal one, O: `W <- W - lr (0.2 sqrt(max(rows, columns)) O + weight_decay W)`. The factor is Liu et
    al.'s (2025, arXiv:2502.16982, section 2.2), so that a step moves a matrix as far as AdamW would: learning rates
    and weight decays of AdamW's recipes hold.

    Args:
        groups: the parameter groups; those with `is_muon` hold matrices `(rows, columns)`.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of Muon.
        ns_steps: Newton-Schulz steps that orthogonalise.
    """

    def __init__(
        self,
        groups: list[Group],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        ns_steps: int = 5,
    ):
        muon, adamw = ([group for group in groups if group["is_muon"] is flag] for flag in (True, False))
        options = {"momentum": momentum, "ns_steps": ns_steps, "adjust_lr_fn": "match_rms_adamw"}
        self.optimizers: list[Optimizer] = [
            *([Muon(muon, **options)] if muon else []),
            *([AdamW(adamw, betas=betas, eps=eps)] if adamw else []),
        ]
        super().__init__([group for optimizer in self.optimizers for group in optimizer.param_groups], {})
        self._share_groups_and_state()

    def _share_groups_and_state(self) -> None:
        """Let both optimisers work on the groups and the state of this one, which schedulers and checkpoints know."""
        for optimizer in self.optimizers:
            is_muon = isinstance(optimizer, Muon)
            optimizer.param_groups = [group for group in self.param_groups if group["is_muon"] is is_muon]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share_groups_and_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Move every parameter that has a gradient; `closure` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


def make_muon(groups: list[Group], model: PreTrainedModel, parts: list[Part], args: TrainingArguments) -> MuonWithAdamW:
    """Return `MuonWithAdamW` over the parts' groups, each divided into matrices of hidden layers and the rest.

    `trainer.optim_args` sets `momentum` and `ns_steps`, `trainer.adam_…` AdamW's settings.

    Raises:
        ValueError: `trainer.optim_args` has other options.
    """
    names = hidden_matrix_names(model, parts)
    ids = {id(parameter) for name, parameter in model.named_parameters() if name in names}
    divided = []
    for group in groups:
        for is_muon in (True, False):
            if params := [parameter for parameter in group["params"] if (id(parameter) in ids) is is_muon]:
                label = MUON if is_muon else "adamw"
                divided.append({**group, "name": f"{group['name']}.{label}", "params": params, "is_muon": is_muon})
    options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    try:
        return MuonWithAdamW(divided, **options, **parse_options(args.optim_args))  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise ValueError(f"trainer.optim_args={args.optim_args}: {error}; muon takes momentum and ns_steps") from error


def hidden_matrix_names(model: PreTrainedModel, parts: list[Part]) -> frozenset[str]:
    """Return the full names of the weights of linear layers, but not of embeddings, vocabulary heads or heads.

    Patch and other convolutions, learned queries and positions are no weights of linear layers.
    """
    linear = {f"{prefix}.weight" for prefix, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    matrices = {name for part in parts if part.name != HEAD for name, p in part.parameters.items() if p.ndim == 2}
    return frozenset((linear & matrices) - token_embedding_names(model))


def read_learning_rates(optimizer: Optimizer, rates: Sequence[float | Tensor]) -> dict[str, float]:
    """Return `learning_rate/<part>` of each part, the highest where its layers differ, out of the groups' rates."""
    logged: dict[str, float] = {}
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        key = f"learning_rate/{group['name'].split('.')[0]}"
        logged[key] = max(logged.get(key, 0.0), float(rate))
    return logged
