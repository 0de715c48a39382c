"""Models on data: tasks, data sets, live models, scores."""

from .data import DataSpec, class_names, few_shot, load_split
from .inputs import Prepared, prepare, prepare_rows
from .live import LiveModel, load_live, module_params, with_state
from .run import Score, Scores, evaluate, loss_of, score_dict
from .tasks import TaskSpec, load_task
from .unlabelled import Inputs

__all__ = [
    "DataSpec",
    "Inputs",
    "LiveModel",
    "Prepared",
    "Score",
    "Scores",
    "TaskSpec",
    "class_names",
    "evaluate",
    "few_shot",
    "load_live",
    "load_split",
    "load_task",
    "loss_of",
    "module_params",
    "prepare",
    "prepare_rows",
    "score_dict",
    "with_state",
]
