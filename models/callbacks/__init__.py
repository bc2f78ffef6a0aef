"""Lightning callbacks: what is shown, measured and saved around the training of a network."""

from models.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from models.callbacks.detections import DetectionFiles, evaluation_files
from models.callbacks.display import (
    ModelTable,
    model_figures,
    print_evaluation,
    print_results,
    print_training_results,
    progress_bar,
)
from models.callbacks.divergence import FiniteLoss
from models.callbacks.final import FinalValidation, final_figures
from models.callbacks.resuming import ExactResume
from models.callbacks.routing import RoutingStatistics
from models.callbacks.saving import SavedConfig
from models.callbacks.throughput import EvaluationSpeed, Throughput

__all__ = [
    "BestCheckpoint",
    "DetectionFiles",
    "EvaluationSpeed",
    "ExactResume",
    "FinalValidation",
    "FiniteLoss",
    "LastCheckpoint",
    "ModelTable",
    "RoutingStatistics",
    "SavedConfig",
    "Throughput",
    "evaluation_files",
    "final_figures",
    "model_figures",
    "print_evaluation",
    "print_results",
    "print_training_results",
    "progress_bar",
]
