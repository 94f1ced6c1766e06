import ast
import sys
from pathlib import Path

import ddpm

ALLOWED = {"torch", "numpy", "safetensors"}


def test_the_core_imports_torch_numpy_and_safetensors_only():
    found = set()
    for path in Path(ddpm.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[0] for name in names}
    assert found - set(sys.stdlib_module_names) - {"ddpm"} <= ALLOWED
