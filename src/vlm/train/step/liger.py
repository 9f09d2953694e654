"""Liger's kernels (Hsu et al. 2024, arXiv:2410.10989) in norms, rotations and gates: `trainer.use_liger_kernel`.

Its fused loss is not used: vocabulary logits exist at supervised positions only, in chunks, on any device.
"""

from collections.abc import Mapping

from transformers import PreTrainedModel

from vlm.assembly.model_kinds import get_language_model


def apply_liger_kernels(model: PreTrainedModel, options: Mapping[str, bool] | None) -> list[str]:
    """Apply Liger's kernels to the language model, or a whole model of a family; return the modules that use them.

    The options are `trainer.liger_kernel_config`, such as `rope: false`.

    Raises:
        ValueError: Liger is not installed, or does not know the language model.
    """
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError as error:
        raise ValueError(
            f"trainer.use_liger_kernel=true: Liger cannot be imported ({error}): pip install 'small-vlm[liger]'"
        ) from error
    options = dict(options or {})
    if losses := [name for name in ("cross_entropy", "fused_linear_cross_entropy") if options.get(name)]:
        raise ValueError(
            f"trainer.liger_kernel_config.{losses[0]}=true: the loss is computed only at supervised positions, which "
            "Liger's loss does not support; leave it out"
        )
    target = get_language_model(model)
    _apply_liger_kernel_to_instance(model=target, **{"fused_linear_cross_entropy": False, **options})
    changed = [name for name, module in target.named_modules() if "forward" in vars(module)]
    if not changed:
        raise ValueError(
            f"trainer.use_liger_kernel=true: Liger has no kernel for model_type={target.config.model_type} with "
            f"trainer.liger_kernel_config={options}; leave it out"
        )
    return changed
