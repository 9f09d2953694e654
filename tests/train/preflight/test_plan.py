"""A plan on paper: GPUs by their names, what fits on them, and the time that counted operations take."""

import re

import pytest

from tests.fixtures import compose_config
from vlm.train.monitor.peak_flops import DATA_SHEET_TFLOPS
from vlm.train.preflight.plan import MEMORY_GB, Devices, make_plan


def test_gpus_are_read():
    assert Devices.parse("GPUS=8xH100") == Devices(8, "H100", 80 * 10**9, 989.4)
    assert Devices.parse("2xrtx-4090") == Devices(2, "RTX 4090", 24 * 10**9, 165.2)
    assert Devices.parse("1xA100-40GB").memory == 40 * 10**9
    assert MEMORY_GB.keys() - {"A100 40GB"} <= DATA_SHEET_TFLOPS.keys()


@pytest.mark.parametrize("text", ["GPUS=8", "8xGTX1", "0xH100", "H100"])
def test_other_words_are_refused(text: str):
    with pytest.raises(ValueError, match="GPUS=NxNAME is needed, such as GPUS=8xH100; NAME is one of GB200"):
        Devices.parse(text)


def test_a_plan_says_what_fits_and_how_long(common: list[str]):
    config = compose_config("finetune-smol", [*common, "trainer.deepspeed=zero3", "dataset.max_length=64"])
    plan = make_plan(config, "finetune-smol", (), "GPUS=2xH100", samples=10**6, tokens=40, mfu=0.5)
    assert re.search(r"fits  zero3 +[\d.]+ MB", plan)
    assert "the first that fits: trainer/deepspeed=none" in plan
    (operations,) = re.findall(r"([\d.e+]+) operations", plan)
    (shown,) = re.findall(r"([\d.]+) s on 2 x H100 at 50% of 989.4", plan)
    assert float(shown) == pytest.approx(float(operations) / (2 * 989.4e12 * 0.5), rel=0.06)
    assert "187,500 steps of 16 samples" in plan  # three epochs of 8 samples on each of two GPUs


def test_data_that_is_not_here_is_asked_for(common: list[str]):
    config = compose_config("finetune-smol", [*common, "dataset.path=nowhere.json"])
    with pytest.raises(ValueError, match=r"dataset.path=nowhere.json is not on this machine: give --samples and --tok"):
        make_plan(config, "finetune-smol", (), "GPUS=1xH100")
