"""Self-supervised methods, and their table, METHODS."""

from fastssl.core.optimizers import ParamGroup
from fastssl.core.schedules import Clock
from fastssl.methods.method import Method, StepOutput
from fastssl.methods.method_defaults import MethodDefaults
from fastssl.methods.method_table import METHODS, get_method
from fastssl.methods.moco_v3 import MoCoV3
from fastssl.methods.view_plan import ViewPlan

__all__ = [
    "METHODS",
    "Clock",
    "Method",
    "MethodDefaults",
    "MoCoV3",
    "ParamGroup",
    "StepOutput",
    "ViewPlan",
    "get_method",
]
