"""What every trainer runs on: the loop, the run folder, resume. `Trainer` and `Evaluation` are what a kind of training adds."""

from fastssl.training.evaluation import BestBy, Evaluation
from fastssl.training.loop import Summary, train
from fastssl.training.loop_config import LoopConfig
from fastssl.training.run_folder import RunFolder
from fastssl.training.trainer import Trainer

__all__ = ["BestBy", "Evaluation", "LoopConfig", "RunFolder", "Summary", "Trainer", "train"]
