"""Published results of LLaVA-1.5 7B, to compare scores of lmms-eval's tasks with. Imports nothing."""

PUBLISHED_RESULTS = {
    ("gqa", "exact_match"): (0.6201, 0.6192),
    ("mme", "mme_perception_score"): (1505.5, 1509.1),
    ("mme", "mme_cognition_score"): (321.4, 355.7),
    ("mmbench_en_dev", "gpt_eval_score"): (66.07, 64.09),
    ("mmbench_cn_dev", "gpt_eval_score"): (54.90, 55.67),
    ("scienceqa", "exact_match"): (0.6977, 0.6572),
    ("seedbench", "seed_image"): (0.6593, 0.6616),
    ("textvqa_val", "exact_match"): (0.4902, 0.4600),
    ("mmmu_val", "mmmu_acc"): (0.3789, 0.3611),
    ("ai2d", "exact_match"): (0.5379, 0.5518),
}
"""lmms-eval's names of task and metric -> the result with this framework's recipe, and with the published weights."""
