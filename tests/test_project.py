"""The project's own promises: import floors, line budgets, the public page, a lean import."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The public page (`lamina.__all__`). Scripts outside the project are written against it: a name
# that is taken away or renamed here breaks them.
PUBLIC = (
    *("Budget", "Method", "Network", "Plan", "Recovery", "Report"),
    *("apply", "compress", "discover", "load", "measure", "plan", "propose", "recover", "report"),
    *("save", "zoo"),
)

# Slow to import, and needed by some calls only.
HEAVY = (
    *(
        "accelerate",
        "hypothesis",
        "jinja2",
        "llvmlite",
        "matplotlib",
        "numba",
        "onnx",
        "onnxscript",
    ),
    *("onnxruntime", "pandas", "pydantic", "ray", "rich", "scipy", "tensorly", "tokenizers"),
    *("torch_pruning", "torchao", "transformers", "typer"),
)

# Places of one machine or one account. Put together from parts, or this file would find itself.
MACHINE_PATHS = re.compile(r"(?<![\w.~/-])/" + r"(?:home|Users|root|work|opt|mnt)/[\w.]")


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
    )


def run_python(code: str) -> str:
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lint_imports(cwd: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of the pyproject.toml in `cwd` against the package in `cwd`/src."""
    code = (
        "import sys; sys.path.insert(0, 'src'); from importlinter.cli import lint_imports;"
        "sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True))"
    )
    return run(sys.executable, "-c", code, cwd=cwd)


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_imports_run_one_way() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("importer", "imported", "is_allowed"),
    [
        ("lamina.cli", "lamina.errors", True),
        ("lamina.artifact.container", "lamina.codecs.rans", True),
        ("lamina.zoo.lenet", "lamina.data.mnist", True),
        ("lamina.methods.alds", "lamina.methods.base", True),
        ("lamina.network.trace", "lamina.errors", True),
        ("lamina.methods.alds", "lamina.methods.kmeans", False),
        ("lamina.methods.base", "lamina.plan.budget", False),
        ("lamina.network.trace", "lamina.forms.dense", False),
        ("lamina.codecs.rans", "lamina.run", False),
        ("lamina.measure.cost", "lamina.artifact.container", False),
        ("lamina.report.page", "lamina.train.loop", False),
        ("lamina.zoo.lenet", "lamina.forms.dense", False),
        ("lamina.data.mnist", "lamina.codecs.rans", False),
        ("lamina.errors", "lamina.codecs.rans", False),
        ("lamina.forms.dense", "lamina", False),  # the page imports everything
        ("lamina.cli", "lamina.attic", False),  # a module without a floor
    ],
)
def test_contracts_tell_good_imports_from_bad(
    tmp_path: Path, importer: str, imported: str, is_allowed: bool
) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "src" / "lamina"
    names = ("cli", "compress", "run", "errors", "report.page", "train.loop", "plan.budget")
    names += ("methods.base", "methods.alds", "methods.kmeans", "measure.cost", "network.trace")
    names += ("artifact.container", "forms.dense", "codecs.rans", "zoo.lenet", "data.mnist")
    modules = {f"lamina.{name}": "" for name in names} | {imported: ""}
    modules[importer] = f"import {imported}\n"
    for name, text in modules.items():
        path = package.joinpath(*name.split(".")[1:]).with_suffix(".py")
        if name == "lamina":
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for folder in {path.parent for path in package.rglob("*.py")} | {package}:
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text("import lamina.compress\nimport lamina.codecs.rans\n")
    done = lint_imports(tmp_path)
    assert (done.returncode == 0) == is_allowed, done.stdout + done.stderr
    assert "broken" in done.stdout, done.stdout + done.stderr  # it did get as far as the verdict


def test_files_keep_their_line_budget() -> None:
    script = load_script("check_lines")
    assert script.find_overruns(script.ROOT, script.BUDGETS) == []


def test_line_budget_finds_a_long_file(tmp_path: Path) -> None:
    script = load_script("check_lines")
    (tmp_path / "src" / "room").mkdir(parents=True)
    (tmp_path / "src" / "room" / "fits.py").write_text("x = 1\n" * 400)
    (tmp_path / "src" / "room" / "long.py").write_text("x = 1\n" * 401)
    found = script.find_overruns(tmp_path, script.BUDGETS)
    assert found == ["src/room/long.py: 401 lines, limit 400"]


def test_public_page_is_pinned() -> None:
    import lamina

    assert tuple(sorted(lamina.__all__)) == PUBLIC
    assert issubclass(lamina.errors.LaminaError, Exception)


def test_public_names_are_not_hidden_by_modules() -> None:
    # `lamina.plan` is a function, though a package of that name lies beside it: importing a module
    # must not put the package in the function's place.
    code = """
import importlib, json, pkgutil, lamina
for found in pkgutil.walk_packages(lamina.__path__, "lamina."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
print(json.dumps([name for name in lamina.__all__ if not callable(getattr(lamina, name))]))
"""
    assert json.loads(run_python(code)) == []


def test_import_is_lean() -> None:
    code = f"""
import json, sys, torch
before = set(sys.modules)
import lamina
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([sorted(new & set({HEAVY!r})), "lamina" in new, torch.cuda.is_initialized()]))
"""
    heavy, is_lamina_new, is_cuda_touched = json.loads(run_python(code))
    assert heavy == []
    assert is_lamina_new  # else nothing was measured
    assert not is_cuda_touched


def test_version_is_the_one_of_pyproject() -> None:
    from importlib.metadata import version

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{version("lamina")}"' in text


def list_files() -> list[Path]:
    """Return the files git knows or would add; without git, the ones a source archive holds."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.returncode == 0:
        return [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for folder in ("src", "tests", "scripts") for path in (ROOT / folder).rglob("*.*")]


def test_no_file_names_a_machine_path() -> None:
    hits, count = [], 0
    for path in list_files():
        if not path.is_file() or b"\0" in (content := path.read_bytes()):
            continue
        count += 1
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if MACHINE_PATHS.search(line):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert hits == []
    assert count > 5


def test_machine_paths_are_recognised() -> None:
    assert MACHINE_PATHS.search("open('/" + "home/ada/net.pt')")
    assert MACHINE_PATHS.search("cd /" + "root/x")
    assert not MACHINE_PATHS.search("https://example.org/work/net and src/opt/x.py, ~/home/x")
