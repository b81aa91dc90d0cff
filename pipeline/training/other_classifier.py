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
        ValueError: it is no classifier, or has other labels.
    """

    def __init__(self, source: str, data: StepDataModule) -> None:
        if not isinstance(data, TextClassificationDataModule):
            raise ValueError("--before compares classifiers, this is none; leave it out.")
        self.data, self.called = data, f"before ({source})"
        self.rival, self.loaded = before(stem_of(source)), load_classifier(source)
        names = self.loaded.meta["label_names"]
        if names != data.label_names:  # in another order they would be split otherwise, too
            raise ValueError(
                f"{self.called} has the labels {names}, here they are {data.label_names}."
            )

    def probabilities(self) -> dict[Rival, Array]:
        """(N, K) of the test's texts, in their order.

        Raises:
            ValueError: it may have learned what is held out.
        """
        data, keys = self.data, self.data.keys("test")
        meta, facts = self.loaded.meta, data.fingerprint
        check_held_out(meta, data.config, facts, ["test"], keys, called=self.called)
        found = label_probabilities(self.loaded, data.texts("test"), title="before")
        return {self.rival: np.array(found)}
