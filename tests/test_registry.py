"""Finding entries by name, and the errors of everyone who gets one wrong."""

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rlkit import errors, registry
from rlkit.errors import PluginError, RecipeError


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A function that puts a built-in reward into a folder of its own, which replaces the real one for a test."""
    import rlkit.rewards

    folder = tmp_path / "shelf"
    folder.mkdir()
    real = registry._folder
    monkeypatch.setattr(registry, "_folder", lambda package: folder if package == "rlkit.rewards" else real(package))
    monkeypatch.setattr(rlkit.rewards, "__path__", [str(folder)])
    before = set(sys.modules)
    yield lambda name, text: (folder / f"{name}.py").write_text(text)
    forget(before, "rlkit.rewards.")


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """A function that installs a distribution: a module, and entry points as a wheel would have left them."""
    before = set(sys.modules)

    def install(distribution, module, text, entry_points, group="rlkit.rewards"):
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-0.3.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.3.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry_points}\n")
        (site / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(site)

    yield install
    forget(before, "acme", "other")


def forget(before, *starts):
    for name in set(sys.modules) - before:
        if name.startswith(starts):
            del sys.modules[name]


def message(call, *arguments, **options):
    with pytest.raises(errors.RlkitError) as caught:
        call(*arguments, **options)
    return str(caught.value)


SHARPNESS = '''"""A module."""
from __future__ import annotations
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal
if TYPE_CHECKING:
    from torch import Tensor

@dataclass(frozen=True)
class Crop:
    size: int = 8

@dataclass(frozen=True)
class Sharp_ness:
    """Not the entry."""

@dataclass(frozen=True)
class EdgeSharpness:
    """How sharp the edges are, 0..1.

    More text."""

    reads: ClassVar = frozenset({"image", "prompt"})
    range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    scale = 2 * 3
    level: int
    blur: float = 0.5  # in pixels
    mode: Literal["sobel", "laplace"] = "sobel"
    name: str | None = None
    """Shown in
    the log."""
    window: tuple[int, int] = (0, 4)
    weights: Sequence[float] = ()
    strict: bool = False
    crop: Crop | None = None
    file: Path | None = None
    filter: Tensor | None = None
    extras: dict[str, float] | None = None
    anything: Any = None

    def __post_init__(self):
        if self.blur < 0:
            raise ValueError("blur must not be negative")
'''


# --------------------------------------------------------------------------------------------- the catalogues


@pytest.mark.parametrize("kind", registry.KINDS)
def test_what_the_source_says_of_an_entry_is_what_the_class_says(kind):
    for entry in registry.describe(kind):
        found = registry.load(kind, entry.name)
        assert entry.source == "built in"
        assert entry.summary, f"{entry.name} has no docstring"
        assert [one.name for one in entry.fields] == [one.name for one in dataclasses.fields(found) if one.init]
        json.dumps(dataclasses.asdict(entry))


def test_describing_imports_no_entry_and_no_torch():
    program = """if True:
        import sys
        from rlkit import registry
        for kind in registry.KINDS:
            registry.describe(kind)
        registry.recipes()
        print([m for m in sys.modules if m.split(".")[0] in ("torch", "numpy") or m.startswith("rlkit.")])
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "['rlkit.errors', 'rlkit.registry']"


def test_an_unknown_catalogue():
    assert message(registry.names, "reward") == (
        "there is no catalogue 'reward'. Did you mean 'rewards'? "
        "Catalogues: rewards, algorithms, backbones, rollouts, tools."
    )


def test_recipes_are_named_by_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_folder", lambda package: tmp_path)
    for file in ("quick.yaml", "large/slow.yaml", "large/_shared.yaml", "small/_shared.yaml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("stages: {}\n")
    assert registry.recipes() == {"quick": tmp_path / "quick.yaml", "slow": tmp_path / "large" / "slow.yaml"}
    (tmp_path / "small" / "slow.yaml").write_text("stages: {}\n")
    assert "two recipes are called 'slow'" in message(registry.recipes)


# --------------------------------------------------------------------------------------------- built-ins


def test_a_built_in_is_read_without_being_imported(shelf):
    shelf("edge_sharpness", SHARPNESS)
    shelf("_shared", "raise RuntimeError('a private file is not an entry')")
    (entry,) = registry.describe("rewards")
    assert (entry.name, entry.kind, entry.source, entry.extra) == ("edge_sharpness", "rewards", "built in", None)
    assert entry.summary == "How sharp the edges are, 0..1."
    assert entry.constants == {"reads": ["image", "prompt"], "range": (0.0, 1.0), "scale": "2 * 3"}
    options = {one.name: one for one in entry.fields}
    assert options["level"] == registry.Option("level", "int", None)
    assert options["blur"] == registry.Option("blur", "float", "0.5", "in pixels")
    assert options["name"].doc == "Shown in the log."
    assert "rlkit.rewards.edge_sharpness" not in sys.modules


def test_a_new_file_is_an_entry(shelf):
    assert registry.names("rewards") == []
    shelf("psnr", "class PSNR:\n    'Elsewhere.'")
    assert registry.names("rewards") == ["psnr"]
    assert registry.load("rewards", "psnr").__name__ == "PSNR"
    assert registry.load("rewards", "rlkit-visual/psnr").__name__ == "PSNR"


def test_a_typo_gets_the_nearest_name(shelf):
    shelf("brightness", "class Brightness: ...")
    assert message(registry.load, "rewards", "Brigthness", "stages.main.rewards") == (
        "stages.main.rewards: no reward named 'Brigthness'. Did you mean 'brightness'? Known: brightness. "
        "A class of your own is written package.module:Class."
    )


def test_a_file_without_its_class(shelf):
    shelf("edge_sharpness", "class EdgeSharpnes: ...")
    for text in (message(registry.load, "rewards", "edge_sharpness"), message(registry.describe, "rewards")):
        assert "edge_sharpness.py has no class for the entry 'edge_sharpness'. Did you mean 'EdgeSharpnes'?" in text
        assert "EdgeSharpness" in text


def test_a_file_that_is_not_python(shelf):
    shelf("broken", "class Broken:\n  def")
    assert "broken.py:2 is not Python" in message(registry.describe, "rewards")


@pytest.mark.parametrize(
    "text",
    [
        "import acme_engine\nclass Legibility:\n    extra = 'ocr'",
        "extra = 'ocr'\nimport acme_engine.parts\nclass LEGIBILITY: ...",
    ],
    ids=["of the class", "of the file"],
)
def test_a_missing_extra_names_the_pip_line(shelf, text):
    shelf("legibility", text)
    assert registry.describe("rewards")[0].extra == "ocr"
    assert message(registry.load, "rewards", "legibility", "stages.main.rewards") == (
        "stages.main.rewards: reward 'legibility' needs 'acme_engine', which is not installed. "
        "Run: pip install 'rlkit-visual[ocr]'"
    )


def test_what_is_missing_when_an_entry_loads_its_model_is_named_too(shelf):
    shelf("legibility", "class Legibility:\n    def load(self, device):\n        import acme_engine")

    def load_model():
        reward = registry.build("rewards", "legibility", {})
        with registry.importing("rewards", "legibility"):
            reward.load("cpu")

    assert message(load_model).endswith("Run: pip install acme_engine")


def test_an_entry_that_fails_while_it_is_imported(shelf):
    shelf("legibility", "1 / 0\n\nclass Legibility: ...")
    text = message(registry.load, "rewards", "legibility")
    what = "importing rlkit.rewards.legibility failed with ZeroDivisionError: division by zero"
    assert text == f"reward 'legibility': {what}"


# --------------------------------------------------------------------------------------------- third parties


def test_an_entry_point_is_an_entry(shelf, third_party):
    shelf("brightness", "class Brightness: ...")
    third_party("acme-rewards", "acme", "class Contrast:\n    'C.'\n", "contrast = acme:Contrast [fast]")
    assert registry.names("rewards") == ["brightness", "contrast"]
    entry = registry.describe("rewards")[1]
    assert (entry.source, entry.extra, entry.summary) == ("acme-rewards 0.3.0", "fast", "")
    assert "acme" not in sys.modules
    assert registry.load("rewards", "contrast") is sys.modules["acme"].Contrast


def test_a_clash_with_a_built_in_has_to_be_decided(shelf, third_party):
    shelf("contrast", "class Contrast: ...")
    third_party("acme-rewards", "acme", "class Contrast: ...\n", "contrast = acme:Contrast")
    assert registry.names("rewards") == ["rlkit-visual/contrast", "acme-rewards/contrast"]
    assert message(registry.load, "rewards", "contrast") == (
        "reward 'contrast' is claimed by rlkit-visual and acme-rewards 0.3.0. "
        "Write one of rlkit-visual/contrast, acme-rewards/contrast."
    )
    assert registry.load("rewards", "acme_rewards/contrast").__module__ == "acme"
    assert registry.load("rewards", "rlkit-visual/contrast").__module__ == "rlkit.rewards.contrast"
    assert "'beta' has no reward 'contrast'" in message(registry.load, "rewards", "beta/contrast")


def test_a_clash_between_third_parties_has_to_be_decided(shelf, third_party):
    third_party("acme-rewards", "acme", "class Contrast: ...\n", "contrast = acme:Contrast")
    third_party("other-rewards", "other", "class Contrast: ...\n", "contrast = other:Contrast")
    text = message(registry.build, "rewards", "contrast", {}, "stages.main.rewards")
    assert text.startswith("stages.main.rewards: reward 'contrast' is claimed by ")
    assert "acme-rewards 0.3.0" in text
    assert "other-rewards/contrast" in text
    assert registry.load("rewards", "other-rewards/contrast").__module__ == "other"


def test_entry_points_that_lead_nowhere(shelf, third_party):
    points = "a = acme:Contrasst\nb = acme_gone:Contrast\nc = acme_parts:Contrast"
    third_party("acme-rewards", "acme", "class Contrast: ...\n", points)
    third_party("acme-parts", "acme_parts", "import acme_engine\n", "d = acme_parts:Contrast [engine]")
    text = message(registry.load, "rewards", "a")
    assert "acme.py) has no 'Contrasst'. Did you mean 'Contrast'?" in text
    assert message(registry.load, "rewards", "b") == "reward 'b': there is no module 'acme_gone'."
    assert message(registry.load, "rewards", "c").endswith("Run: pip install acme_engine")
    assert message(registry.load, "rewards", "d").endswith("Run: pip install 'acme-parts[engine]'")


def test_a_local_class_is_found_from_the_working_directory(tmp_path, monkeypatch):
    package = tmp_path / "acme_local"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text("class Mine:\n    ...\ndef plain(samples):\n    ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    before, path = set(sys.modules), list(sys.path)
    try:
        assert registry.load("rewards", "acme_local.mine:Mine").__name__ == "Mine"
        assert registry.build("rewards", "acme_local.mine:plain", {}).__name__ == "plain"
        assert "takes no options, but got 'a'" in message(registry.build, "rewards", "acme_local.mine:plain", {"a": 1})
        assert "Did you mean 'Mine'?" in message(registry.load, "rewards", "acme_local.mine:Mime")
        assert "there is no module 'acme_local.yours'" in message(registry.load, "rewards", "acme_local.yours:Mine")
        assert sys.path == path
    finally:
        forget(before, "acme_local")


# --------------------------------------------------------------------------------------------- options


@pytest.fixture
def build(shelf):
    shelf("edge_sharpness", SHARPNESS)
    return lambda **options: registry.build("rewards", "edge_sharpness", options, "stages.main.rewards.edge_sharpness")


def test_options_take_the_shape_of_their_annotations(build):
    shapes = {"window": [1, 2], "weights": [1, 2.5], "crop": {"size": 4}, "extras": {"a": 1}}
    built = build(level=3, blur=1, file="a/b", filter=7, **shapes)
    assert (built.level, built.window, built.weights) == (3, (1, 2), (1.0, 2.5))
    assert isinstance(built.blur, float)
    assert built.crop.size == 4
    assert built.file == Path("a/b")
    assert built.filter == 7  # an annotation for type checkers only is not checked
    assert built.extras == {"a": 1.0}
    assert hash(build(level=3, window=[1, 2]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"blurr": 1.0}, ": edge_sharpness has no option 'blurr'. Did you mean 'blur'? Options: level, blur, mode, "),
        ({}, ": edge_sharpness needs 'level'."),
        ({"level": True}, ".level: must be a whole number, not True."),
        ({"level": 1.0}, ".level: must be a whole number, not 1.0."),
        ({"level": None}, ".level: must be a whole number, not None."),
        ({"blur": "1e-3"}, ".blur: must be a number, not '1e-3'. It is text: write 0.001 without quotes."),
        ({"blur": False}, ".blur: must be a number, not False."),
        ({"mode": "sobbel"}, ".mode: must be one of 'sobel', 'laplace', not 'sobbel'. Did you mean 'sobel'?"),
        ({"name": 3}, ".name: must be text, not 3."),
        ({"window": [1, 2, 3]}, ".window: must be a list of 2 (a whole number, a whole number), not [1, 2, 3]."),
        ({"window": [1, "x"]}, ".window[1]: must be a whole number, not 'x'."),
        ({"weights": "abc"}, ".weights: must be a list, each a number, not 'abc'."),
        ({"strict": 1}, ".strict: must be true or false, not 1."),
        ({"crop": {"sise": 3}}, ".crop: Crop has no option 'sise'. Did you mean 'size'?"),
        ({"crop": 3}, ".crop: must be a mapping, not 3."),
        ({"extras": {"a": "b"}}, ".extras.a: must be a number, not 'b'."),
        ({"blur": -1.0}, ": edge_sharpness: blur must not be negative"),
    ],
)
def test_an_option_that_does_not_fit(build, options, text):
    given = {**({} if options == {} or "blurr" in options else {"level": 3}), **options}
    with pytest.raises(RecipeError) as caught:
        build(**given)
    assert str(caught.value).startswith("stages.main.rewards.edge_sharpness" + text)


def test_alternatives_and_plain_classes():
    class Plain:
        def __init__(self, size: int | str = 1, *, rate: "float" = 1.0):
            self.size, self.rate = size, rate

    assert registry.construct(Plain, {"size": "full", "rate": 2}).rate == 2.0
    assert message(registry.construct, Plain, {"size": 1.5}) == "size: must be a whole number or text, not 1.5."
    assert message(registry.construct, Plain, {"sise": 1}, "here") == (
        "here: Plain has no option 'sise'. Did you mean 'size'? Options: size, rate."
    )


# --------------------------------------------------------------------------------------------- the errors themselves


def test_an_error_reads_as_one_sentence_and_survives_a_trip_between_processes():
    error = PluginError("no reward named 'a'.", where="stages.main", hint=" Known: b.")
    assert str(error) == "stages.main: no reward named 'a'. Known: b."
    assert str(errors.DataError("empty")) == "empty"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.hint) == (PluginError, str(error), error.hint)


def test_nearest():
    assert errors.nearest("FLOW-GRP", ["flow_grpo", "awm"]) == " Did you mean 'flow_grpo'?"
    assert errors.nearest("zzz", ["flow_grpo", "awm"]) == ""
