"""Names of classes reach the terminal as text: no markup, no escape sequence."""

import io

from rich.console import Console

from fastssl.commands.eval_command import print_knn


def test_classes_in_the_table_of_knn() -> None:
    names = ["[/x]", "[bold]b", "\x1b[2Jc", "d\ne"]
    row = {
        "features": "the run, student",
        "accuracy": {1: 0.5},
        "per_class": dict.fromkeys(names, 0.25),
        "per_class_k": 1,
    }
    file = io.StringIO()
    print_knn({"queries": "4 queries", "rows": [row], "classes": names}, Console(file=file, width=80))
    shown = file.getvalue()
    assert "\x1b" not in shown
    for name in ("[/x]", "[bold]b", r"\x1b[2Jc", r"d\ne"):
        assert name in shown
