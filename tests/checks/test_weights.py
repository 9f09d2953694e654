"""Which weights an evaluation is of."""

from pathlib import Path

from vlm.checks.weights import fingerprint, identify_weights, is_of_other_weights


def test_an_evaluation_is_of_other_weights_once_they_are_replaced(tmp_path: Path):
    final = tmp_path / "final"
    final.mkdir()
    (final / "model.safetensors").write_bytes(b"step 21")
    results: dict[str, object] = {"weights": identify_weights(f"{final}/", final)}
    assert results["weights"] == {"folder": "final", "fingerprint": fingerprint(final)}
    assert not is_of_other_weights(results, tmp_path)
    (final / "model.safetensors").write_bytes(b"step 28")
    assert is_of_other_weights(results, tmp_path)


def test_what_is_unknown_is_not_of_other_weights(tmp_path: Path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    unknown = [{}, {"weights": "x"}, {"weights": {"folder": "../run", "fingerprint": "x"}}, {"weights": {"folder": 3}},
               {"weights": {"folder": "checkpoint-7", "fingerprint": "x"}}]  # fmt: skip
    assert not any(is_of_other_weights(results, tmp_path / "run") for results in unknown)
