"""A model on paper has the parts and the frozen parameters of the run's, and no weights."""

from tests.fixtures import compose_config
from vlm.assembly.resolve import resolve_model
from vlm.train.objectives.table import make_objective
from vlm.train.preflight.libraries import libraries_restored
from vlm.train.preflight.paper import prepare_on_paper


def test_it_trains_what_the_run_trains(common: list[str]):
    config = compose_config("pretrain-smol", [*common, "trainer.deepspeed=zero3"])
    with libraries_restored():
        model, paper, args, parts = prepare_on_paper(make_objective(config), *resolve_model(config), half=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"connector"}
    assert [part.name for part in parts] == ["visual_encoder", "connector", "language_model"]
    assert (paper.trainer.deepspeed, args.bf16, config.trainer.deepspeed) == (None, True, "zero3")
