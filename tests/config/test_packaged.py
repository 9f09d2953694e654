"""The descriptions of shipped runs: whole, and as one statement in the list of `vlm --help`."""

import re

from vlm.config.packaged import read_run_description, read_run_summary, run_names


def test_each_run_is_listed_with_one_statement():
    summaries = {name: read_run_summary(name) for name in run_names()}
    assert {name: text for name, text in summaries.items() if not 20 < len(text) < 190} == {}
    assert {name: text for name, text in summaries.items() if re.search("Differs|arXiv|Starts from|as in ", text)} == {}
    assert summaries["pretrain-llava"] == "LLaVA-1.5's first stage: only the connector, on 558k captions, 8 GPUs"


def test_a_description_is_the_comment_at_the_head_of_a_run():
    assert read_run_description("pretrain-llava").startswith("LLaVA-1.5's first stage (Liu et al. 2023, arXiv")
    assert read_run_description("a-run-of-my-own") == ""
