"""Tests mirror the package: `src/vlm/a/b.py` is tested in `tests/a/test_b.py`, or `TESTED_ELSEWHERE` says where."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "vlm"
LONGEST = 60
"""Lines of a module that needs no tests of its own: those of what uses it suffice."""

TESTED_ELSEWHERE = {
    "assembly/adapter_base.py": "train/test_lora.py",
    "assembly/adapter_checks.py": "attack/test_checkpoints.py",
    "assembly/adapter_folder.py": "train/test_lora.py",
    "assembly/checkpoint_heads.py": "train/heads/test_checkpoints.py",
    "assembly/config_checks.py": "attack/test_checkpoints.py",
    "assembly/family.py": "families/test_families.py",
    "assembly/family_trial/kept.py": "train/test_family_trial.py",
    "assembly/heads.py": "models/test_prediction_checkpoints.py",
    "assembly/model_interface.py": "families/test_families.py",
    "assembly/opening.py": "assembly/test_loading.py",
    "assembly/packed_attention.py": "train/step/test_packing.py",
    "assembly/packed_rows.py": "families/test_family_packing.py",
    "assembly/resolve.py": "train/heads/test_training.py",
    "assembly/small_models/fields.py": "assembly/small_models/test_shrink.py",
    "assembly/small_models/layers.py": "assembly/small_models/test_shrink.py",
    "assembly/small_models/processors.py": "assembly/small_models/test_make.py",
    "assembly/small_models/rotary.py": "assembly/small_models/test_shrink.py",
    "assembly/small_models/tokenizers.py": "assembly/small_models/test_make.py",
    "assembly/small_models/defaults.py": "assembly/small_models/test_make.py",
    "assembly/small_models/widths.py": "assembly/small_models/test_shrink.py",
    "assembly/trial_process.py": "assembly/test_processor_trial.py",
    "checks/compose.py": "cli/test_train.py",
    "checks/dataset.py": "checks/test_run.py",
    "checks/embeddings.py": "train/objectives/test_embedding.py",
    "checks/fields.py": "checks/test_run.py",
    "checks/model.py": "checks/test_run.py",
    "cli/data.py": "data/tools/test_show.py",
    "cli/export_checkpoint.py": "cli/test_checkpoints.py",
    "cli/model_options.py": "cli/test_generate.py",
    "cli/model_details.py": "families/test_families.py",
    "cli/predict.py": "inference/test_predict.py",
    "cli/push_to_hub.py": "hub/test_publishing.py",
    "cli/record_options.py": "cli/test_evaluate.py",
    "cli/web.py": "web/test_plan.py",
    "config/derived.py": "config/test_recipes.py",
    "config/named.py": "checks/test_surface.py",
    "config/rules.py": "checks/test_run.py",
    "config/model_schema.py": "config/test_schema.py",
    "config/serving_schema.py": "cli/test_serve.py",
    "config/training_fields.py": "config/test_schema.py",
    "data/batching/batch.py": "data/batching/test_collator.py",
    "data/coordinates/convention.py": "data/coordinates/test_table.py",
    "data/coordinates/json_forms.py": "data/coordinates/test_table.py",
    "data/coordinates/text_forms.py": "data/coordinates/test_table.py",
    "data/coordinates/token_forms.py": "data/coordinates/test_table.py",
    "data/encoding/sample_encoder.py": "data/test_dataset.py",
    "data/feature_cache/families.py": "train/feature_cache/test_families.py",
    "data/feature_cache/heads.py": "train/feature_cache/test_heads.py",
    "data/feature_cache/images.py": "train/feature_cache/test_images.py",
    "data/objects.py": "data/records/test_objects.py",
    "data/pairs/encoder.py": "data/pairs/test_dataset.py",
    "data/records/answers.py": "data/records/test_formats.py",
    "data/records/files.py": "data/records/test_layout.py",
    "data/records/paths.py": "data/records/test_open.py",
    "data/records/http.py": "data/records/test_tar.py",
    "data/records/positions.py": "data/records/test_tar.py",
    "data/sources.py": "data/test_dataset.py",
    "data/tools/corpora.py": "data/tools/test_convert.py",
    "data/tools/exports.py": "data/tools/test_convert.py",
    "data/tools/forms.py": "data/tools/test_write.py",
    "data/tools/stats.py": "data/tools/test_show.py",
    "data/tools/table.py": "data/tools/test_download.py",
    "data/tools/verdicts.py": "data/tools/test_clean.py",
    "demo/tiny_models.py": "demo/test_scenes.py",
    "evaluation/bootstrap.py": "evaluation/test_head_metrics.py",
    "evaluation/embed_file.py": "inference/test_embed.py",
    "evaluation/lmms_run.py": "cli/test_evaluate.py",
    "evaluation/output.py": "cli/test_evaluate.py",
    "evaluation/predict_file.py": "inference/test_predict.py",
    "evaluation/records.py": "cli/test_evaluate.py",
    "families/processing.py": "families/test_families.py",
    "families/table.py": "families/test_families.py",
    "hub/adapters.py": "hub/test_importing.py",
    "hub/card.py": "hub/test_publishing.py",
    "hub/folders.py": "hub/test_importing.py",
    "hub/gguf/language_models.py": "hub/gguf/test_exporting.py",
    "hub/gguf/llama_cpp.py": "hub/gguf/test_exporting.py",
    "hub/gguf/mmproj.py": "hub/gguf/test_exporting.py",
    "hub/gguf/readback.py": "hub/gguf/test_exporting.py",
    "hub/gguf/tensors.py": "hub/gguf/test_exporting.py",
    "hub/gguf/tokenizer.py": "hub/gguf/test_exporting.py",
    "hub/layouts.py": "hub/test_exporting.py",
    "hub/onnx/graphs.py": "hub/onnx/test_exporting.py",
    "hub/onnx/session.py": "hub/onnx/test_exporting.py",
    "hub/opening.py": "hub/test_exporting.py",
    "hub/processors.py": "hub/test_exporting.py",
    "hub/run_facts.py": "hub/test_publishing.py",
    "hub/sources.py": "hub/test_importing.py",
    "hub/targets.py": "hub/test_exporting.py",
    "hub/templates.py": "hub/test_importing.py",
    "hub/tiles.py": "hub/test_tiled_exports.py",
    "inference/engine/cache.py": "inference/engine/test_batch.py",
    "inference/engine/options.py": "inference/engine/test_engine.py",
    "inference/engine/row.py": "inference/engine/test_engine.py",
    "inference/vector_table.py": "inference/test_embed.py",
    "inference/verify/endpoint.py": "inference/verify/test_server_engines.py",
    "inference/verify/engines.py": "inference/verify/test_verify.py",
    "inference/verify/plain_reader.py": "inference/verify/test_reading_job.py",
    "inference/verify/served_forms.py": "inference/verify/test_paper.py",
    "inference/verify/server_process.py": "inference/verify/test_server_engines.py",
    "inference/resumable_table.py": "inference/test_batch.py",
    "inference/serving/answers.py": "inference/serving/test_chat.py",
    "inference/serving/app.py": "inference/serving/test_gate.py",
    "inference/serving/batcher.py": "inference/serving/test_classify.py",
    "inference/serving/chat_request.py": "inference/serving/test_validation.py",
    "inference/serving/embeddings.py": "inference/serving/test_conformance.py",
    "inference/serving/errors.py": "inference/serving/test_validation.py",
    "inference/serving/messages.py": "inference/serving/test_chat.py",
    "inference/serving/pooling_request.py": "inference/serving/test_classify.py",
    "inference/serving/service.py": "inference/serving/test_chat.py",
    "models/configuration_prediction.py": "models/test_prediction_checkpoints.py",
    "models/connector_parts.py": "models/test_connectors.py",
    "models/pixels.py": "models/test_processing_vlm.py",
    "train/distillation/comparison.py": "train/objectives/test_distillation.py",
    "train/distillation/logit_cache.py": "train/objectives/test_distillation.py",
    "train/distillation/teacher.py": "train/objectives/test_distillation.py",
    "train/embeddings/data.py": "train/objectives/test_embedding.py",
    "train/embeddings/vectors.py": "train/objectives/test_embedding.py",
    "train/feature_cache/replay.py": "train/feature_cache/test_families.py",
    "train/guards/trainer.py": "train/guards/test_step_guard.py",
    "train/arguments.py": "train/test_trainer.py",
    "train/checkpoints/files.py": "train/checkpoints/test_writer.py",
    "train/checkpoints/saving.py": "train/checkpoints/test_trainer.py",
    "train/checkpoints/sizes.py": "train/checkpoints/test_trainer.py",
    "train/feature_cache/encoder.py": "train/feature_cache/test_images.py",
    "train/feature_cache/fingerprints.py": "train/feature_cache/test_images.py",
    "train/heads/data.py": "train/heads/test_training.py",
    "train/heads/report.py": "train/objectives/test_prediction.py",
    "train/monitor/callbacks.py": "train/test_sample_generation.py",
    "train/monitor/peak_flops.py": "train/monitor/test_speed.py",
    "train/monitor/plots.py": "train/test_run.py",
    "train/objectives/base.py": "train/objectives/test_objectives.py",
    "train/objectives/generation.py": "train/objectives/test_objectives.py",
    "train/interruptible.py": "train/resume/test_exactness.py",
    "train/parts.py": "train/test_trainer.py",
    "train/resume/changes.py": "train/resume/test_start.py",
    "train/resume/directory.py": "train/resume/test_start.py",
    "train/resume/progress.py": "train/resume/test_exactness.py",
    "train/resume/record.py": "train/resume/test_start.py",
    "train/run_directory.py": "train/test_run.py",
    "train/stop_on_signal.py": "train/test_run.py",
    "web/chat.py": "web/test_page.py",
    "web/data.py": "web/test_page.py",
    "web/guard.py": "web/test_plan.py",
    "web/html.py": "web/test_page.py",
    "web/predict.py": "web/test_page.py",
    "web/run_view.py": "web/test_runs.py",
    "web/train.py": "web/test_page.py",
}
"""A module, within `src/vlm` -> the test file that tests it, within `tests`."""

MODULES = {
    path.relative_to(SOURCE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
    for path in SOURCE.rglob("*.py")
    if path.name != "__init__.py"
}


def find_test_file(module: str) -> Path:
    """Return where a module's tests belong."""
    return TESTS / Path(module).with_name(f"test_{Path(module).name}")


@pytest.mark.parametrize("module", sorted(name for name, lines in MODULES.items() if lines > LONGEST))
def test_a_module_has_a_test_file_of_its_name_or_is_tested_elsewhere(module: str):
    expected = find_test_file(module)
    assert expected.is_file() or module in TESTED_ELSEWHERE, f"write {expected}, or say where {module} is tested"


@pytest.mark.parametrize("module", TESTED_ELSEWHERE)
def test_what_is_tested_elsewhere_is_so(module: str):
    assert MODULES.get(module, 0) > LONGEST, f"{module} is gone or short: take it out"
    assert not find_test_file(module).is_file(), f"{module} has a test file of its name: take it out"
    assert (TESTS / TESTED_ELSEWHERE[module]).is_file(), f"{TESTED_ELSEWHERE[module]} is gone"
