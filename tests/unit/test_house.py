"""The house keeps its promises: light imports, valid configurations, thin jobs, layers that name every room."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

from valley_ray.config import load_config, validate_config
from valley_ray.serve.config import read_serve_file

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "valley_ray"
HEAVY = ("torch", "ray", "transformers", "deepspeed", "gradio", "accelerate")
MAX_JOB_LINES = 60


def modules_of(*rooms: str) -> list[str]:
    """Every module of a package (room folder) or the module itself."""
    names = []
    for room in rooms:
        path = PACKAGE / room
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            parts = file.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(part for part in parts if part != "__init__"))
    return names


def loaded_by(code: str) -> set[str]:
    """Which of HEAVY a fresh interpreter has loaded after `code`."""
    report = f"import sys; print(*(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)"
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=120, check=True
    )
    return set(shown.stderr.split())


def imports_of(names: list[str]) -> str:
    return "\n".join(f"import {name}" for name in names)


def test_media_and_chat_leave_torch_and_ray_unloaded() -> None:
    names = modules_of("media", "chat")
    assert len(names) > 10
    assert loaded_by(imports_of(names)) == set()


def test_what_a_command_needs_before_its_work_is_light() -> None:
    light = [
        "errors",
        "config",
        "fetch",
        "fetch_http",
        "cli",
        "processor",
        "serve/config",
        "train/config",
        "data/schema",
    ]
    for room in light:
        assert loaded_by(imports_of(modules_of(room))) == set(), room


def test_the_engines_interface_loads_no_torch() -> None:
    assert loaded_by("import valley_ray.engine.engine, valley_ray.engine.open") == set()


def test_help_loads_nothing_heavy() -> None:
    for arguments in (["--help"], ["ask", "--help"], ["serve", "--help"], ["--version"]):
        code = (
            f"from valley_ray.cli import main\ntry: main({arguments!r})\nexcept SystemExit as end: assert end.code == 0"
        )
        assert loaded_by(code) == set(), arguments


def test_importing_the_package_imports_nothing() -> None:
    code = "before = set(sys.modules)\nimport valley_ray\nassert set(sys.modules) - before == {'valley_ray'}"
    assert loaded_by(f"import sys\n{code}") == set()


def test_every_serve_config_is_valid_and_the_first_one_is_for_a_laptop() -> None:
    paths = sorted((ROOT / "serve_configs").glob("*.yaml"))
    configs = {path.name: read_serve_file(path) for path in paths}
    config, http = configs["valley.yaml"]
    assert config.model == Path("models/nano"), "it runs as it stands after `make quickstart`"
    assert http.host == "127.0.0.1", "nobody else may reach a laptop"


def test_every_job_config_is_valid() -> None:
    from valley_ray.data.config import PipelineConfig, PrepareConfig
    from valley_ray.data.download.config import DownloadConfig
    from valley_ray.evaluate.config import AnswerSettings, EvaluationConfig
    from valley_ray.train.config import TrainConfig

    paths = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
    for path in paths:
        others = {"download.yaml": DownloadConfig, "prepare.yaml": PrepareConfig}
        others |= {"answer.yaml": AnswerSettings, "evaluate.yaml": EvaluationConfig}
        if path.name in others:
            load_config(others[path.name], path)
            continue
        config = load_config(TrainConfig, path)
        if config.data.pipeline is not None:
            validate_config(PipelineConfig, {"model": config.model, **config.data.pipeline}, source=path.name)


def test_jobs_are_thin() -> None:
    for path in sorted((ROOT / "jobs").glob("*.py")):
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= MAX_JOB_LINES, f"{path.name} has {num_lines} lines; its work belongs into a room"


def test_the_layers_name_every_room() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [layers] = [one["layers"] for one in settings["tool"]["importlinter"]["contracts"] if one["type"] == "layers"]
    named = {name.strip(" ()").removeprefix("valley_ray.") for layer in layers for name in layer.split("|")}
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__"} <= named


def test_ray_data_is_imported_where_the_design_says() -> None:
    """Import contracts know whole external packages only: `ray.data` inside ray is looked up here."""
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(name.name.startswith("ray.data") for name in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray.data"))
    }
    rooms = {name.partition("/")[0] for name in importers}
    assert rooms <= {"data", "evaluate", "quickstart"}
