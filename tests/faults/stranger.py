"""What an untrusted config names: importing this module runs its code."""

import os
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.plugins.environments import LightningEnvironment

Path(os.environ["STRANGER_WRITES"]).touch()


class Callback(pl.Callback):
    """Would be taken for a callback."""


class Environment(LightningEnvironment):
    """Would be taken for a plugin."""
