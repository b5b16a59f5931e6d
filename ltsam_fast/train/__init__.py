"""Training: type ``python -m ltsam_fast train``, or call :func:`train` with a :class:`Config`.

.. code-block:: python

    from ltsam_fast.train import build, train

    rows = train(build({"recipe": "cifar10-lt", "data": "cifar-10", "method": "focal_sam", "loss": "la"}), "runs/focal")
"""

from ltsam_fast.train.config import Config, ConfigError, build, read_file
from ltsam_fast.train.loop import Diverged, train
from ltsam_fast.train.method_registry import METHODS

__all__ = ["METHODS", "Config", "ConfigError", "Diverged", "build", "read_file", "train"]
