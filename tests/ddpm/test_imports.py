import ast
import subprocess
import sys
from pathlib import Path

import ddpm

ALWAYS = {"torch", "numpy", "safetensors"}
INSIDE_A_FUNCTION = {"torchdiffeq"}
TREES = [ast.parse(path.read_text()) for path in Path(ddpm.__path__[0]).rglob("*.py")]


def imported(nodes):
    found = set()
    for node in nodes:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[0] for name in names}
    return found - set(sys.stdlib_module_names) - {"ddpm", "__future__"}


def test_the_core_imports_torch_numpy_and_safetensors_and_one_solver_where_it_is_needed():
    everywhere = imported(node for tree in TREES for node in ast.walk(tree))
    lazily = imported(
        node for tree in TREES for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)
    )
    assert everywhere == ALWAYS | INSIDE_A_FUNCTION
    assert lazily == INSIDE_A_FUNCTION
    assert "torchdiffeq" not in imported(node for tree in TREES for node in tree.body)


def test_the_sampling_benchmark_runs_where_there_is_torch_only():
    absent = ("ray", "mlflow", "boto3", "webdataset", "hydra", "pydantic", "safetensors", "diffusers", "pipelines")
    program = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import benchmarks.sampling"
    root = Path(ddpm.__path__[0]).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
