"""Self-supervised methods, and their table, METHODS."""

from fastssl.methods.method import Method, StepOutput
from fastssl.methods.method_table import METHODS, get_method
from fastssl.methods.moco_v3 import MoCoV3

__all__ = ["METHODS", "Method", "MoCoV3", "StepOutput", "get_method"]
