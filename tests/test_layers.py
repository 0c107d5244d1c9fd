"""Who may import whom. The rules are read from the source of every file, so that one inside a function counts too.

1. A file imports only from a lower level, or from its own level in its own folder; and no imports run in a ring.
2. The entries of a catalogue are imported by their own folder alone; everything else reaches them by name. `rlkit/` has
   few exceptions (EXCEPTIONS). `world/` imports numpy and the standard library only.
3. Heavy third parties are imported inside functions; what `--help` and `list` run imports no torch.
4. No entry names an entry of another catalogue, and the core names no algorithm.
5. Every file has a level, and every folder is packaged.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LEVELS = {  # files of rlkit/ and folders, the lowest first
    name: level
    for level, names in enumerate(
        (
            ("__init__", "types", "episodes", "registry", "errors"),
            (
                *("flow", "tokens", "advantage", "surrogate", "world"),
                *("pictures", "preprocessing", "embedding", "clauses", "textmatch", "total", "shelf", "resources"),
                *("endpoints", "wire"),
            ),
            ("judging", "workers"),
            ("agents",),
            ("weights", "decoding", "backbones", "rewards", "algorithms", "tools"),
            ("data",),
            ("sync", "scoring", "scorer", "score_cache", "dist", "policy", "language", "parts"),
            ("mirrors",),
            ("learner", "checkpoint", "tracking", "record", "rollouts"),
            ("monitors",),
            ("stages", "run", "trainer", "held_out", "session", "sources"),
            ("recipe", "recipe_fits", "recipe_parts", "recipe_course"),
            ("report",),
            ("plan", "sweep", "bench", "arena", "evaluation", "pretrain", "serve"),
            ("merge", "parity"),
            ("commands",),
            ("cli",),
            ("recipes",),  # YAML: nothing imports it
        )
    )
    for name in names
}
CATALOGUES = ("rewards", "algorithms", "backbones", "rollouts", "tools")
FOLDERS = (  # the other rooms are files of rlkit/
    *("world", *CATALOGUES, "recipes"),
    *("judging", "workers", "agents", "data", "mirrors", "monitors", "report"),
    *("plan", "sweep", "bench", "arena", "evaluation", "pretrain", "serve", "commands"),
)
AT_THE_TOP = ("rewards", "algorithms", "rollouts", "recipes")  # folders beside rlkit/ that are installed below it
EXCEPTIONS = {  # the commands that train the weights that a backbone ships with
    ("rlkit.pretrain.generator", "rlkit.backbones.tiny"),
    ("rlkit.pretrain.connector", "rlkit.backbones.projector"),
    ("rlkit.pretrain.connector", "rlkit.backbones.tiny"),
    ("rlkit.pretrain.connector", "rlkit.backbones.tiny_captioner"),
    ("rlkit.pretrain.captioner", "rlkit.backbones.tiny_captioner"),
    ("rlkit.pretrain.agent", "rlkit.backbones.tiny_agent"),
}
HEAVY = {
    *("datasets", "deepspeed", "diffusers", "matplotlib", "onnxruntime", "peft", "rapidocr", "ray", "transformers"),
    *("httpx", "prometheus_client", "starlette", "trl", "uvicorn", "vllm", "vllm_omni"),
    *("tensorboard", "trackio", "wandb"),
}
WITHOUT_TORCH = ("rlkit", "rlkit.errors", "rlkit.registry", "rlkit.cli")


# ------------------------------------------------------------------------------------------- the checker


@dataclass(frozen=True)
class Import:
    target: str  # absolute
    line: int
    at_once: bool  # runs when the file is imported: not in a function, not for type checkers only


@dataclass(frozen=True)
class Source:
    path: str  # as a message shows it
    module: str  # rlkit.rewards.ocr
    tree: ast.Module

    @property
    def room(self) -> str:
        return room(self.module)

    def imports(self, modules: set[str]) -> Iterator[Import]:
        for node, at_once in walk(self.tree):
            for target in targets(node, self, modules):
                yield Import(target, node.lineno, at_once)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def folder(of: str) -> str:
    return of if of in FOLDERS else "rlkit"


def sources(root: Path) -> Iterator[Source]:
    for top in ("rlkit", *AT_THE_TOP):
        for file in sorted((root / top).rglob("*.py")):
            path = file.relative_to(root)
            parts = [*([] if top == "rlkit" else ["rlkit"]), *path.with_suffix("").parts]
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield Source(str(path), module, ast.parse(file.read_text(encoding="utf-8")))


def walk(node: ast.AST, at_once: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, with whether it runs when the file is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk(child, False)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from walk(ast.Module(child.body, []), False)
            yield from walk(ast.Module(child.orelse, []), at_once)
        else:
            yield child, at_once
            yield from walk(child, at_once)


def targets(node: ast.AST, source: Source, modules: set[str]) -> Iterator[str]:
    """The modules that one node imports: `import`, `from`, and import_module("...")."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = source.module.split(".")
        if not source.path.endswith("__init__.py"):
            package.pop()
        start = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*start, *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole in modules or (base == "rlkit" and alias.name in LEVELS) else base
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
        name = node.args[0] if node.args else None
        if isinstance(name, ast.JoinedStr):
            name = name.values[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield name.value.rstrip(".")


def breaches(root: Path) -> list[str]:
    files = list(sources(root))
    modules = {one.module for one in files}
    imported = {one.module: list(one.imports(modules)) for one in files}
    found = []
    for source in files:
        if source.room not in LEVELS:
            found.append(f"{source.path}: not in the table of levels: give it a level")
            continue
        if source.room == "recipes" and source.module != "rlkit.recipes":
            found.append(f"{source.path}: recipes/ holds YAML only")
        for one in imported[source.module]:
            reason = refused(source, one)
            if reason:
                found.append(f"{source.path}:{one.line}: {reason}")
    found += rings({module: [one.target for one in rows] for module, rows in imported.items()})
    found += torch_at_once(imported)
    found += foreign_names(files)
    return found


def refused(source: Source, one: Import) -> str | None:
    """Why this file may not have this import, if it may not."""
    top = one.target.partition(".")[0]
    here, there = source.room, room(one.target)
    if top in AT_THE_TOP:
        return f"imports {one.target}: it is called rlkit.{one.target}"
    of_world = (top, there) == ("rlkit", "world") or top == "numpy" or top in sys.stdlib_module_names
    if here == "world" and not of_world:
        return f"imports {one.target}: world/ imports numpy and the standard library only"
    if top in HEAVY and one.at_once:
        return f"imports {one.target} when it is imported: move it into the function that needs it"
    if top != "rlkit" or (source.module, one.target) in EXCEPTIONS:
        return None
    if there not in LEVELS:
        return f"imports {one.target}, which is not in the table of levels"
    if there in CATALOGUES and there != here:
        return f"imports {one.target}: entries of {there}/ are reached by name, through the registry"
    if LEVELS[there] > LEVELS[here]:
        return f"imports {one.target} of level {LEVELS[there]} from level {LEVELS[here]}"
    if LEVELS[there] == LEVELS[here] and folder(there) != folder(here):
        return f"imports {one.target}, a stranger of the same level"
    return None


def rings(imports: dict[str, list[str]]) -> list[str]:
    """Each ring of imports once, found by walking down from every file."""
    found: dict[frozenset[str], str] = {}
    done: set[str] = set()

    def down(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            ring = path[path.index(module) :]
            found.setdefault(frozenset(ring), " -> ".join((*ring, module)))
        elif module not in done:
            for target in imports.get(module, []):
                if target in imports:
                    down(target, (*path, module))
            done.add(module)

    for module in imports:
        down(module, ())
    return [f"imports run in a ring: {ring}" for ring in found.values()]


def torch_at_once(imported: dict[str, list[Import]]) -> list[str]:
    """The files that must not import torch, and through which file they do."""
    found = []
    for start in WITHOUT_TORCH:
        seen, ahead = set(), [start]
        while ahead:
            module = ahead.pop()
            if module in seen or module not in imported:
                continue
            seen.add(module)
            now = [one.target for one in imported[module] if one.at_once]
            if any(target.partition(".")[0] == "torch" for target in now):
                through = "" if module == start else f" through {module}"
                found.append(f"{start}: imports torch{through}; `--help` and `list` must not")
            parents = [".".join(target.split(".")[:i]) for target in now for i in range(1, target.count(".") + 1)]
            ahead += [*now, *parents]
    return found


def from_elsewhere(node: ast.AST) -> list[str]:
    """The names that an import statement takes from outside of rlkit."""
    if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] in ("rlkit", ""):
        return []
    return [alias.asname or alias.name for alias in node.names]


def foreign_names(files: list[Source]) -> list[str]:
    """Entries that are named outside their catalogue, by a string or by their class. Docstrings are free to.

    Names of rollouts are not looked for: they are plain words (local, ray, dataset)."""
    homes: dict[str, set[str]] = {}  # file stem or class name -> the catalogues that have it
    for source in files:
        stem = source.module.rpartition(".")[2]
        if source.room in ("rewards", "algorithms", "backbones") and not stem.startswith("_") and stem != source.room:
            classes = [node.name for node in source.tree.body if isinstance(node, ast.ClassDef)]
            for word in (stem, *(name for name in classes if name.casefold() == stem.replace("_", ""))):
                homes.setdefault(word, set()).add(source.room)
    found = []
    for source in files:
        docstrings = {id(node.value) for node in ast.walk(source.tree) if isinstance(node, ast.Expr)}
        elsewhere = {one for node in ast.walk(source.tree) for one in from_elsewhere(node)}
        for node in ast.walk(source.tree):
            word = spoken(node)
            if isinstance(node, ast.Name) and word in elsewhere:
                continue  # itertools' pairwise is not the reward of that name
            if id(node) in docstrings or source.room in homes.get(word, {source.room}):
                continue
            if source.room in CATALOGUES or "algorithms" in homes[word]:
                found.append(f"{source.path}:{node.lineno}: names {word!r}, an entry of {', '.join(homes[word])}/")
    return found


def spoken(node: ast.AST) -> str:
    """The string, name or attribute that a node is."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


# ------------------------------------------------------------------------------------------- this repository


def test_this_repository_keeps_the_rules():
    assert breaches(ROOT) == []


def test_every_folder_is_packaged_and_linked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {Path(one.path).parent for one in sources(ROOT)}
    assert {str(path).replace("/", ".").removeprefix("rlkit.") for path in folders} == {
        package.removeprefix("rlkit.") for package in project["packages"]
    }
    for package, place in project["package-dir"].items():
        link = ROOT / ".typing" / package.replace(".", "/")
        if "." in package and package != "rlkit.recipes":
            assert link.resolve() == ROOT / place, f"type checkers look for {package} at {link}"


def rooms() -> list[str]:
    """The map's table: each room with its level and the first line of its docstring."""
    rows = []
    for name, level in LEVELS.items():
        folder = ROOT / name if name in AT_THE_TOP else ROOT / "rlkit" / name
        path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        if name not in ("__init__", "recipes"):
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            shown = f"{folder.relative_to(ROOT)}/" if folder.is_dir() else str(path.relative_to(ROOT))
            rows.append(f"| {level} | `{shown}` | {said.splitlines()[0]} |")
    return rows


def test_the_map_has_every_room():
    table = "\n".join(rooms())
    assert table in (ROOT / "docs" / "map.md").read_text(encoding="utf-8"), f"the table should read:\n{table}"


@pytest.mark.parametrize("command", [["--help"], ["list", "rewards"]], ids=" ".join)
def test_help_and_list_import_nothing_heavy(command, tmp_path):
    probe = f"""if True:
        import runpy, sys
        sys.argv = ["rlkit", *{command!r}]
        try:
            runpy.run_module("rlkit.cli", run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, stop.code
        print(sorted({{"torch", *{sorted(HEAVY)!r}}} & set(sys.modules)), file=sys.stderr)
    """
    run = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert run.stderr.strip().splitlines()[-1] == "[]"


# ------------------------------------------------------------------------------------------- the checker itself

GOOD = {
    "rlkit/__init__.py": "__version__ = '1'",
    "rlkit/errors.py": "import difflib",
    "rlkit/registry.py": "from rlkit.errors import RlkitError",
    "rlkit/types.py": "import torch",
    "rlkit/flow.py": "import torch\nfrom rlkit.types import Plan",
    "rlkit/world/__init__.py": "",
    "rlkit/world/scenes.py": "import numpy as np\nimport json",
    "rlkit/world/checker.py": "from .scenes import Scene\nfrom rlkit.world import scenes",
    "rlkit/backbones/tiny.py": "from rlkit import flow\nclass Tiny:\n    def load(self):\n        import diffusers",
    "rlkit/policy.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft\nimport torch",
    "rlkit/learner.py": "from rlkit.dist import mean\nfrom rlkit import policy",
    "rlkit/dist.py": "import torch.distributed",
    "rlkit/pretrain/generator.py": "from rlkit.backbones.tiny import Tiny",
    "rlkit/cli.py": "from rlkit import registry\ndef main():\n    from rlkit.recipe import read\n    name = 'tiny'",
    "rlkit/recipe.py": "import torch",
    "rewards/__init__.py": '"""Rewards."""',
    "rewards/_image.py": "import torch",
    "rewards/ocr.py": "'Not sft.'\nfrom ._image import read\nfrom rlkit.rewards import _image\nclass OCR: ...",
    "algorithms/sft.py": "from rlkit import flow, types\nclass SFT:\n    'Does not need ocr.'",
    "rollouts/local.py": "from rlkit.sync import push\nfrom rlkit.policy import Policy",
    "rlkit/sync.py": "import rlkit.policy",
}

BAD = {  # what: (file, text, part of the message)
    "a higher level": (
        "rlkit/flow.py",
        "from rlkit.policy import Policy",
        f"level {LEVELS['policy']} from level {LEVELS['flow']}",
    ),
    "a higher level, in a function": (
        "rlkit/flow.py",
        "def f():\n    import rlkit.cli",
        "flow.py:2: imports rlkit.cli",
    ),
    "a higher level, for type checkers": (
        "rlkit/flow.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rlkit import policy",
        "flow.py:3: imports rlkit.policy",
    ),
    "a higher level, relative": (
        "rewards/ocr.py",
        "from ..sync import push",
        f"level {LEVELS['sync']} from level {LEVELS['rewards']}",
    ),
    "a stranger of the same level": ("rlkit/flow.py", "from rlkit.world import scenes", "a stranger of the same level"),
    "another catalogue": ("rewards/ocr.py", "from rlkit.algorithms.sft import SFT", "reached by name"),
    "another catalogue, in a function": (
        "algorithms/sft.py",
        "def f():\n    from rlkit.rewards import ocr",
        "reached by name",
    ),
    "another catalogue, relative": ("algorithms/sft.py", "from ..backbones import tiny", "reached by name"),
    "a rollout that imports a backbone": ("rollouts/local.py", "import rlkit.backbones.tiny", "reached by name"),
    "policy and a backbone": ("rlkit/policy.py", "from rlkit.backbones import tiny", "reached by name"),
    "the core and a reward": (
        "rlkit/cli.py",
        "def f():\n    import rlkit.rewards.ocr",
        "cli.py:2: imports rlkit.rewards.ocr",
    ),
    "the core and a rollout": ("rlkit/learner.py", "from rlkit import rollouts", "reached by name"),
    "import_module": (
        "rlkit/recipe.py",
        "import importlib\ndef f(name):\n    importlib.import_module(f'rlkit.rewards.{name}')",
        "recipe.py:3: imports rlkit.rewards",
    ),
    "the exception is one file's": ("rlkit/trainer.py", "from rlkit.backbones.tiny import Tiny", "reached by name"),
    "world and torch": ("rlkit/world/scenes.py", "def f():\n    import torch", "numpy and the standard library only"),
    "world and types": ("rlkit/world/scenes.py", "from rlkit.types import Plan", "numpy and the standard library only"),
    "heavy at the top": ("rewards/ocr.py", "import rapidocr", "ocr.py:1: imports rapidocr when it is imported"),
    "heavy in a class body": ("rlkit/policy.py", "class A:\n    from peft import LoraConfig", "when it is imported"),
    "heavy in a try": (
        "rlkit/data/tables.py",
        "try:\n    import datasets\nexcept ImportError:\n    pass",
        "when it is imported",
    ),
    "torch in the registry": ("rlkit/registry.py", "import torch", "rlkit.registry: imports torch;"),
    "torch below the command line": (
        "rlkit/cli.py",
        "from rlkit.types import Plan",
        "rlkit.cli: imports torch through rlkit.types",
    ),
    "torch in the package": ("rlkit/__init__.py", "from torch import Tensor", "rlkit: imports torch;"),
    "a folder without its package": (
        "rlkit/trainer.py",
        "from rewards.ocr import OCR",
        "it is called rlkit.rewards.ocr",
    ),
    "a ring": ("rlkit/dist.py", "def f():\n    from rlkit.learner import step", "rlkit.dist -> rlkit.learner"),
    "a file without a level": ("rlkit/utils.py", "import torch", "utils.py: not in the table"),
    "a folder without a level": ("rlkit/models/net.py", "import torch", "net.py: not in the table"),
    "an import of nowhere": (
        "rlkit/cli.py",
        "def f():\n    import rlkit.helpers",
        "rlkit.helpers, which is not in the table",
    ),
    "code among recipes": ("recipes/quickstart.py", "steps = 3", "YAML only"),
    "a backbone that names an algorithm": (
        "rlkit/backbones/tiny.py",
        "def f(x):\n    return x == 'sft'",
        "tiny.py:2: names 'sft'",
    ),
    "an algorithm that names a backbone": ("algorithms/sft.py", "kinds = {'tiny': 1}", "sft.py:1: names 'tiny'"),
    "an algorithm that names a reward's class": (
        "algorithms/sft.py",
        "def f(x):\n    return x.OCR",
        "sft.py:2: names 'OCR'",
    ),
    "a rollout that names a reward": ("rollouts/local.py", "skip = ['ocr']", "local.py:1: names 'ocr'"),
    "the core names an algorithm": ("rlkit/recipe.py", "fast = name == 'sft'", "recipe.py:1: names 'sft'"),
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    assert breaches(plant(tmp_path, GOOD)) == []


@pytest.mark.parametrize("case", BAD)
def test_a_breach_is_caught(case, tmp_path):
    path, text, message = BAD[case]
    found = breaches(plant(tmp_path, {**GOOD, path: text}))
    assert any(message in one for one in found), found
    assert all(Path(path).stem.removesuffix("__init__") in one for one in found), f"more than was planted: {found}"
