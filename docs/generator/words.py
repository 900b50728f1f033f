"""What the code says of the members of an enumeration: the string that stands below each in its source."""

import ast
import inspect
from enum import Enum
from itertools import pairwise

from docs.generator.markdown import sentence


def docs_of_members(kind: type[Enum]) -> dict[str, str]:
    """By a member's name, the string below it; a member without one is absent."""
    tree = ast.parse(inspect.getsource(kind))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef))
    found: dict[str, str] = {}
    for before, after in pairwise(body):
        if not isinstance(before, ast.Assign) or not isinstance(before.targets[0], ast.Name):
            continue
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            found[before.targets[0].id] = sentence(after.value.value)
    return found
