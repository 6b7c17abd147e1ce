"""The rules of the house, kept from the code's own imports: rings, owners of engines, sizes, and what never enters the repository."""
import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import schedule

ROOT = Path(__file__).parents[1]
PACKAGES = ("ctrlrl", "actors", "jobs")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

RING0 = {"errors", "seeds"}
RING2 = {"models", "demo"}
RING4 = {"cli"}
# ring -> third-party packages that it may import besides those of the rings within (ring 4 may import anything) ...
ALLOWED = {0: set(), 1: {"torch", "numpy", "scipy", "pyarrow", "pydantic"}, 2: {"transformers", "peft"}, 3: {"ray"}}
# ... and those that a few files alone may
EXCEPTIONS = {
    "matplotlib": {"ctrlrl/evaluation/plots.py", "ctrlrl/evaluation/charts.py"},
    "jinja2": {"ctrlrl/evaluation/report.py", "ctrlrl/chat.py"},
    "datasets": {"ctrlrl/data/files.py"},  # read where it is installed
    "httpx": {"ctrlrl/models/service.py"},
    "huggingface_hub": {"ctrlrl/models/fingerprint.py"},
    "pathspec": {"ctrlrl/upload.py"},
    "prometheus_client": {"ctrlrl/models/served.py"},
    "safetensors": {"ctrlrl/demo/training.py", "ctrlrl/models/soup.py", "ctrlrl/models/state.py"},
    "tensorboard": {"ctrlrl/board.py"},
    "starlette": {"ctrlrl/serving/app.py"},
    "tokenizers": {"ctrlrl/demo/vocabulary.py"},
}
UNDECLARED = {"datasets"}  # whoever reads from the hub is told to install it
OWNERS = {
    "deepspeed": {"ctrlrl/models/trainer.py", "ctrlrl/models/earlier_state.py"},
    "vllm": {f"ctrlrl/models/{name}.py" for name in ("sampler", "ranks", "engine_rank", "reload", "served")},
}
MAX_LINES, MAX_FUNCTION = 300, 60


def ring(path: Path) -> int:
    """The ring of a file, from its place."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "jobs" or (parts[0] == "ctrlrl" and parts[1] in RING4):
        return 4
    if parts[0] == "actors":
        return 3
    if len(parts) > 1 and parts[1] in RING2:
        return 2
    return 0 if len(parts) > 1 and parts[1] in RING0 else 1


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, imported at the top level?) of every import statement."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append((node.module, top))
    return found


def module_ring(module: str) -> int | None:
    """The ring of one of our own modules; None for others."""
    if module.split(".")[0] not in PACKAGES:
        return None
    path = ROOT / module.replace(".", "/")
    return ring(path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py")


def third_party(module: str) -> str | None:
    """The package of a module that is neither ours nor of the standard library; None for others."""
    package = module.split(".")[0]
    return None if package in PACKAGES or package in sys.stdlib_module_names else package


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_inwards(path):
    own = ring(path)
    for module, _ in imports(path):
        theirs = module_ring(module)
        if theirs is not None:
            assert theirs <= own, f"{path.name} (ring {own}) imports {module} (ring {theirs})"
            assert theirs < 4 or own == 4
        elif own < 4 and (package := third_party(module)) and package not in OWNERS:
            allowed = any(package in ALLOWED[ring] for ring in range(own + 1))
            assert allowed or str(path.relative_to(ROOT)) in EXCEPTIONS.get(package, ()), f"{path.name} (ring {own}) imports {module}"


def test_what_is_imported_is_what_pyproject_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared, vllm = ({re.match(r"[\w.-]+", line)[0].replace("-", "_") for line in lines} for lines in (
        project["dependencies"], project["optional-dependencies"]["cuda"]
    ))  # fmt: skip
    assert "vllm" in vllm
    imported = {package for path in FILES for module, _ in imports(path) if (package := third_party(module))}
    assert imported - UNDECLARED == declared | {"vllm"}


@pytest.mark.parametrize("engine", OWNERS)
def test_an_engine_is_named_by_its_owner_alone_and_inside_functions(engine):
    users = {str(p.relative_to(ROOT)): top for p in FILES for module, top in imports(p) if module.split(".")[0] == engine}
    assert set(users) == OWNERS[engine]
    assert not any(users.values()), "import it inside the functions that need it"


def test_the_command_line_imports_jobs_only_inside_commands():
    top = [module for module, top in imports(ROOT / "ctrlrl/cli.py") if top]
    assert [m for m in top if m.split(".")[0] in PACKAGES] == ["jobs.parts.launch"]


def test_files_of_tests_have_names_of_their_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}  # pytest would take one for the other


def test_jobs_are_what_can_be_started():
    named = [m for m, top in imports(ROOT / "ctrlrl/cli.py") if not top and m.startswith("jobs.") and not m.startswith("jobs.parts.")]
    started = [*named, "jobs.replicas"]  # which Ray Serve starts: cluster/serve.yaml
    assert sorted(started) == sorted(f"jobs.{path.stem}" for path in (ROOT / "jobs").glob("*.py") if path.stem != "__init__")
    assert {path.name for path in (ROOT / "jobs").iterdir() if path.is_dir()} - {"__pycache__"} == {"parts", "recipes"}


def test_remote_calls_are_written_in_actors_alone():
    assert not [p for p in FILES if ".remote(" in p.read_text() and p.relative_to(ROOT).parts[0] != "actors"]


def test_shells_stay_thin():
    for path in (ROOT / "actors").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any("remote" in ast.unparse(d) for d in node.decorator_list):
                statements = [s for m in node.body if isinstance(m, ast.FunctionDef) for s in m.body]
                assert len(statements) <= 15, f"{node.name} has {len(statements)} statements"
                assert not any(isinstance(n, (ast.For, ast.While, ast.If, ast.Try)) for n in ast.walk(node)), f"{node.name} has logic"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes_and_names(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES
    assert path.stem not in {"utils", "common", "helpers", "misc"}
    if path.parent.name == "jobs":  # `python jobs/x.py` puts this folder before the standard library
        assert path.stem not in sys.stdlib_module_names
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno <= MAX_FUNCTION, f"{node.name} is too long"
        if isinstance(node, ast.ExceptHandler) and ring(path) != 3:
            assert node.type is not None and ast.unparse(node.type) not in {"Exception", "BaseException"} or _reraises(node), (
                f"{path.name}:{node.lineno} catches everything"
            )
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), f"{path.name} has no docstring"
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    for node in public:
        assert ast.get_docstring(node) or node.name == "main" or "mistakes_told" in node.name, f"{path.name}: {node.name} has no docstring"


def _reraises(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None


def test_top_level_is_fixed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert top == {
        "pyproject.toml", "ctrlrl", "actors", "jobs", "cluster", "tests", "README.md",
        "Makefile", "LICENSE", ".ci", ".gitignore", "requirements",
    }  # fmt: skip


def test_nothing_names_a_machine_or_a_package_index():
    forbidden = re.compile(r"/root/|/opt/wheels|/work/|--(extra-)?index-url|files\.pythonhosted|pypi\.org|download\.pytorch")
    own = Path(__file__).name
    for path in [p for folder in (*PACKAGES, "tests", "cluster", "requirements") for p in (ROOT / folder).rglob("*") if p.is_file()]:
        if path.suffix in {".py", ".toml", ".md", ".yaml", ".txt"} and path.name != own:
            assert not forbidden.search(path.read_text()), path


def test_the_order_of_the_tests_names_files_that_there_are():
    named = [name for chain in schedule.CHAINS for name in chain]
    assert len(set(named)) == len(named) and [name for name in named if not (ROOT / "tests" / name).is_file()] == []
