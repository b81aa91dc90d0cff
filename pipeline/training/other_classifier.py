"""Another classifier that a test compares with, on the same texts."""

import numpy as np

from datamodules.step_data_module import StepDataModule
from datamodules.text_classification import TextClassificationDataModule
from pipeline.checkpoint import stem_of
from pipeline.evaluation.metrics import Array
from pipeline.held_out import check_held_out
from pipeline.inference import label_probabilities, load_classifier
from pipeline.training.classifier_report import Rival, before


class OtherClassifier:
    """Read before a test begins, so that a mistake costs none.

    Args:
        source: its checkpoint.
        data: what both are tested on.

    Raises:
        ValueError: it is no classifier, has other labels, or may have learned what is held out.
    """

    def __init__(self, source: str, data: StepDataModule) -> None:
        if not isinstance(data, TextClassificationDataModule):
            raise ValueError("--before compares classifiers, this is none; leave it out.")
        self.data, called = data, f"before ({source})"
        self.rival, self.loaded = before(stem_of(source)), load_classifier(source)
        names = self.loaded.meta["label_names"]
        if names != data.label_names:  # in another order they would be split otherwise, too
            raise ValueError(f"{called} has the labels {names}, here they are {data.label_names}.")

        data.setup("test")
        meta, facts, keys = self.loaded.meta, data.fingerprint, data.keys("test")
        check_held_out(meta, data.config, facts, ["test"], keys, called=called)

    def probabilities(self) -> dict[Rival, Array]:
        """(N, K) of the test's texts, in their order."""
        found = label_probabilities(self.loaded, self.data.texts("test"), title="before")
        return {self.rival: np.array(found)}
