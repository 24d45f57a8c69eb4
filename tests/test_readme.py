"""What the pages say: their examples run, their commands compose, the files and knobs they name are there."""

import ast
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import dbb
import train as train_script
from models import build_model
from models.build import UNTRAINED
from settings.schema import Settings
from settings.values import flat
from tests.helpers import ROOT, call, randomize, relative_error

pytestmark = pytest.mark.slow

PAGES = [*sorted(Path(ROOT).glob("*.md")), *sorted(Path(ROOT, "docs").glob("*.md")),
         Path(ROOT, "results", "README.md"), Path(ROOT, "benchmarks", "README.md")]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
HYDRA_SCRIPTS = ("train.py", "eval.py", "convert.py")
FLOORS = ("dbb", "models", "export", "settings", "images", "runs", "evaluation", "reports", "training",
          "conversion")  # each imports those before it


def examples(page: str) -> list[str]:
    """The Python of a page, an example each."""
    return re.findall(r"```python\n(.*?)```", Path(ROOT, page).read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, word by word: of its indented lines, and those between backticks."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (.*)$", text, re.MULTILINE) + re.findall(r"`(python [^`]*)`", text)
    return [words for line in lines if (words := shlex.split(line.replace(".venv/bin/", ""), comments=True))
            and any(word in ("python", "make", "torchrun") for word in words[:2])]


def test_the_readme_is_short():
    lines = Path(ROOT, "README.md").read_text().splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 110 and not line.startswith("|") and "](" not in line] == []


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = Path(ROOT, name)
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in anchors, anchor


@pytest.mark.parametrize("name", NAMES)
def test_files_and_knobs_are_there(name):
    knobs, text = flat(OmegaConf.to_container(OmegaConf.structured(Settings))), Path(ROOT, name).read_text()
    folders = "|".join(["configs", *FLOORS, "tests", "tools", "benchmarks", "results", "docs"])
    for path in re.findall(rf"`((?:{folders})/[\w/.]*)`", text):
        places = Path(ROOT, path), Path(ROOT, name).parent / path
        assert "tiny" in path or any(place.exists() for place in places), path
    groups = "model|block|data|optim|trainer|logger"
    for knob in re.findall(rf"`'?((?:{groups})\.(?!py|pt|onnx|safe)[a-z_]+)[=`]", text):
        assert knob in knobs, knob


@pytest.mark.parametrize("name", NAMES)
def test_commands_compose(name):
    """Those of Hydra's scripts, with every sweep's first value; other scripts and make's targets exist."""
    targets = re.findall(r"^(\w+):", Path(ROOT, "Makefile").read_text(), re.MULTILINE)
    for words in commands(Path(ROOT, name)):
        if words[0] == "make":
            assert words[1] in targets, words
            continue
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            continue
        assert Path(ROOT, script).exists(), words
        overrides = [word for word in words[words.index(script) + 1:] if "=" in word
                     and not word.startswith(("-", "hydra")) and not word.endswith("=NAME")]
        if script in HYDRA_SCRIPTS:
            parsed = OverridesParser.create().parse_overrides(overrides)
            with initialize_config_dir(str(Path(ROOT, "configs")), version_base="1.3"):
                compose(script.removesuffix(".py"), [plain(override) for override in parsed])


def plain(override) -> str:
    """An override without a sweep: with its first value, or the start of its interval."""
    if not override.is_sweep_override():
        return override.input_line
    if override.is_interval_sweep():
        return f"{override.get_key_element()}={override.value().start}"
    value = next(iter(override.sweep_string_iterator()))
    return f"{override.get_key_element()}={value}"


def test_the_library_in_plain_pytorch(capsys):
    [code] = examples("README.md")
    exec(code, {})
    printed = capsys.readouterr().out
    assert "16 of 20 convolutions became blocks" in printed
    assert "predictions_changed=0" in printed


@pytest.mark.parametrize("code", examples("docs/library.md"))
def test_examples_of_the_library(code):
    exec(code, {})


def test_networks_are_rebuilt(monkeypatch):
    monkeypatch.syspath_prepend(Path(ROOT, "models"))
    parts, namespace = examples("docs/deploy.md")[0].split("\n\n"), {}
    for part, name in zip(parts, ("resnet18", "mobilenet_v1", "resnet20"), strict=True):
        exec(part, namespace)
        ours = build_model(name, 10, image_size=32)
        namespace["net"].load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(namespace["net"].eval()(x), ours.eval()(x))


def test_a_branch_of_your_own(monkeypatch):
    monkeypatch.setitem(dbb.BRANCHES, "row", None)  # so that it is taken out again
    namespace = {}
    exec(examples("docs/extending.md")[0], namespace)
    block = namespace["block"]
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64)
    block.train()(x).square().sum().backward()
    assert block.branches["row"].gain.grad is not None
    randomize(block).eval()
    with torch.no_grad(), dbb.branchwise(block):
        assert relative_error(block.fuse()(x), block(x)) < 1e-12


def test_a_network_of_your_own(monkeypatch, capsys):
    monkeypatch.setattr("models.build.UNTRAINED", dict(UNTRAINED))
    exec(examples("docs/extending.md")[1], {})
    assert "2 of 2 convolutions became blocks" in capsys.readouterr().out


def test_a_data_set_of_your_own(make_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(examples("docs/extending.md")[2], {})
    [words] = [words for words in commands(Path(ROOT, "docs", "extending.md")) if "data=folder" in words]
    result = train_script.train(make_settings(*words[2:], "logger=csv"), tmp_path / "run")
    assert result["predictions_changed"] == 0


@pytest.mark.parametrize("script", HYDRA_SCRIPTS)
def test_help_starts_with_what_to_type(script, tmp_path):
    shown = call(script, "--help", cwd=tmp_path).stdout
    assert f"python {script} " in shown[:300]
    assert "resnet18_dbb" in shown
    assert "Hydra" not in shown


def test_floors():
    """As docs/architecture.md has them."""
    for below, above in itertools.combinations(FLOORS, 2):
        for path in Path(ROOT, below).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                    [node.module] if isinstance(node, ast.ImportFrom) else []
                assert above not in {name.split(".")[0] for name in names}, path


def test_a_wheel_imports_with_torch_and_nothing_else(tmp_path):
    shutil.copytree(Path(ROOT, "dbb"), tmp_path / "source" / "dbb")  # pip leaves folders where it builds
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(Path(ROOT, name), tmp_path / "source")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", tmp_path, tmp_path / "source"], check=True)
    [wheel] = tmp_path.glob("*.whl")
    code = ("import sys, torch; before = set(sys.modules)\n"
            f"sys.path.insert(0, {str(wheel)!r})\n"
            "import dbb; assert '.whl' in dbb.__file__\n"
            "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
            "assert new - set(sys.stdlib_module_names) - {'torch'} == {'dbb'}, new\n")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
