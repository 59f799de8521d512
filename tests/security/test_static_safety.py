"""Nothing of ours runs what a file or a message brings: told from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("potluck", "shard", "transport", "planner", "devices", "bench")

# Modules whose readers run what they read, or that make code of text.
_MODULES = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "code",
    "codeop", "imp", "runpy", "xmlrpc", "telnetlib", "ftplib", "yaml",
}  # fmt: skip
_BUILTINS = {"eval", "exec", "compile", "__import__"}
# The last parts of dotted names, however the module was imported.
_CALLS = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "torch.load", "torch.jit.load",
    "torch.hub.load", "torch.save", "torch.package", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load",
    "importlib.import_module", "importlib.util.spec_from_file_location", "tempfile.mktemp",
}  # fmt: skip
_TRUSTING = {"trust_remote_code", "auto_map", "custom_pipeline"}
_LOADERS = (
    "AutoTokenizer",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoProcessor",
    "PreTrainedTokenizerFast",
)

# Names that are ours: of a command from a table, of an architecture from one of those that run, and of the peer in a
# bench.
_REVIEWED = {
    ("potluck/cli/app.py", "importlib.import_module"),
    ("shard/mlx_backend/build.py", "importlib.import_module"),
    ("bench/peers/llama_child.py", "from importlib import import_module"),
}


class Finder(ast.NodeVisitor):
    """Collects what must not be, as "line: what"."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, node: ast.AST, what: str) -> None:
        self.found.append(f"{getattr(node, 'lineno', 0)}: {what}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._imported(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._imported(node, node.module or "")
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            if alias.name in _MODULES or any(_ends(name, call) for call in _CALLS):
                self.add(node, f"from {node.module} import {alias.name}")

    def visit_Name(self, node: ast.Name) -> None:
        # Also where it is only passed on.
        if node.id in _BUILTINS:
            self.add(node, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = _dotted(node)
        if any(_ends(name, call) for call in _CALLS) or name in {f"builtins.{builtin}" for builtin in _BUILTINS}:
            self.add(node, name)
        if node.attr in _TRUSTING:
            self.add(node, node.attr)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and node.value in _TRUSTING | _MODULES - {"code"}:
            self.add(node, repr(node.value))

    def visit_Call(self, node: ast.Call) -> None:
        name = _dotted(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for flag in ("shell", "allow_pickle", "trust_remote_code"):
            if flag in given and not (isinstance(given[flag], ast.Constant) and given[flag].value is False):  # type: ignore[attr-defined]
                self.add(node, f"{name}({flag}=…)")
        if name.split(".")[-1] == "from_pretrained" and name.split(".")[-2:-1] and name.split(".")[-2] in _LOADERS:
            is_local = given.get("local_files_only")
            if not (isinstance(is_local, ast.Constant) and is_local.value is True):
                self.add(node, f"{name} without local_files_only=True")
        self.generic_visit(node)

    def _imported(self, node: ast.AST, module: str) -> None:
        if module.split(".")[0] in _MODULES:
            self.add(node, f"import {module}")


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _ends(name: str, call: str) -> bool:
    return name == call or name.endswith(f".{call}")


def _found(source: str) -> list[str]:
    finder = Finder()
    finder.visit(ast.parse(source))
    return finder.found


def _sources() -> Iterator[Path]:
    for package in _PACKAGES:
        yield from sorted((_ROOT / package).rglob("*.py"))


def test_nothing_of_ours_runs_what_it_reads() -> None:
    sources = list(_sources())
    assert len(sources) > 150
    found = []
    for path in sources:
        name = path.relative_to(_ROOT).as_posix()
        whats = _found(path.read_text("utf-8"))
        found += [f"{name}:{what}" for what in whats if (name, what.partition(": ")[2]) not in _REVIEWED]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "import torch\nload = torch.load",
        "torch.load('x', weights_only=True)",
        "eval('1')",
        "run = exec",
        "compile('1', '', 'eval')",
        "__import__('pickle')",
        "import builtins\nbuiltins.eval('1')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "import yaml",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "AutoTokenizer.from_pretrained(p, trust_remote_code=True, local_files_only=True)",
        "AutoTokenizer.from_pretrained(p)",
        "transformers.AutoConfig.from_pretrained(p, local_files_only=False)",
        "PreTrainedTokenizerFast.from_pretrained(p)",
        "f(**{'trust_remote_code': True})",
        "config['auto_map']",
        "getattr(module, 'pickle')",
        "importlib.import_module(name)",
    ],
)
def test_the_check_finds(source: str) -> None:
    assert _found(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('a')",
        "model.eval()",
        "os.execv(a, b)",
        "torch.compile(f)",
        "np.load('x', allow_pickle=False)",
    ],
)
def test_the_check_lets_pass(source: str) -> None:
    assert _found(source) == []
