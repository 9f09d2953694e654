"""Messages about the labels of a run's records."""

from vlm.config.dataset_schema import SourceConfig
from vlm.train.heads.data import explain_label_key


def test_the_key_of_labels_and_what_names_another_are_told():
    told = explain_label_key(SourceConfig(path="a.json"))
    assert (
        told == "Labels are read from `label`; dataset.format=labelled dataset.options.label_key=KEY reads another key"
    )
    told = explain_label_key(SourceConfig(path="a.csv", format="labelled", options={"label_key": "shape"}))
    assert told == "Labels are read from `shape`; dataset.options.label_key=KEY names another key"
