"""Mixing the weights of runs: the sum is exact, for all weights and for LoRA, and what does not fit is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlkit import cli, merge, recipe, session
from rlkit.errors import RecipeError

CPU = torch.device("cpu")


def words(backbone: Path, folder: Path, seed: int, *more: str) -> list[str]:
    return [
        *("quickstart", "--quiet", f"policy.backbone.path={backbone}", f"run.dir={folder}", f"run.seed={seed}"),
        *("run.threads=1", "run.wandb=disabled", "run.device=cpu", "stages.main.steps=1", "stages.main.expect=null"),
        *("stages.main.data.per_step=2", "stages.main.data.group=4", "stages.main.learner={batch: 16, lr: 0.01}"),
        *(
            "stages.main.evaluate={every: 0, held_out: 4, ends: null}",
            "stages.main.rewards={composition: null, brightness: 1}",
        ),
        *more,
    ]


LORA = ("policy.train={full: null, lora: {rank: 2, alpha: 6}}",)


@pytest.fixture(scope="module")
def runs(small_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two runs of all weights, and two of LoRA with different ranks and scales."""
    made: dict[str, list[Path]] = {"full": [], "lora": []}
    folder = tmp_path_factory.mktemp("runs")
    other = ("policy.train={full: null, lora: {rank: 3, alpha: 3}}",)
    for kind, seed, more in (("full", 0, ()), ("full", 1, ()), ("lora", 0, LORA), ("lora", 1, other)):
        at = folder / f"{kind}-{seed}"
        assert cli.main(["train", *words(small_backbone, at, seed, *more)]) == 0
        made[kind].append(at)
    return made


def trained(folder: Path) -> dict[str, Tensor]:
    """The weights that a run shows: its average."""
    setup = recipe.read(str(folder / "recipe.yaml"))
    policy = session.load_policy(setup, folder=folder)
    policy.use(setup.stages[-1].evaluate.weights)
    return policy.snapshot()


def test_all_weights_are_their_weighted_sum(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    assert (
        cli.main(["merge", *map(str, runs["full"]), "--weights", "0.25", "0.75", "--out", str(tmp_path / "out")]) == 0
    )
    mixed = dict(SD3Transformer2DModel.from_pretrained(tmp_path / "out").named_parameters())
    one, other = (trained(folder) for folder in runs["full"])
    assert any(not torch.equal(one[name], other[name]) for name in one)
    for name, value in mixed.items():
        torch.testing.assert_close(value.data, 0.25 * one[name] + 0.75 * other[name], rtol=1e-6, atol=1e-7)


def changes(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """layer -> scale B A."""
    found = {}
    for name, down in weights.items():
        if ".lora_A." in name:
            found[name.split(".lora_A.")[0]] = scale * weights[name.replace(".lora_A.", ".lora_B.")] @ down
    return found


def test_the_changes_of_lora_are_summed_exactly(
    runs: dict[str, list[Path]], small_backbone: Path, tmp_path: Path
) -> None:
    from diffusers import SD3Transformer2DModel

    line = merge.merge(runs["lora"], [0.5, 2.0], tmp_path / "out")
    assert "load_lora_adapter" in line
    one, other = (changes(trained(folder), scale) for folder, scale in zip(runs["lora"], (3.0, 1.0), strict=True))
    transformer = SD3Transformer2DModel.from_pretrained(small_backbone / "transformer")
    before = {name: value.clone() for name, value in transformer.named_parameters()}
    transformer.load_lora_adapter(str(tmp_path / "out"), prefix=None, use_safetensors=True)
    transformer.fuse_lora()
    assert one
    assert max(float(change.abs().max()) for change in one.values()) > 1e-5
    fused = {name.replace(".base_layer", ""): value for name, value in transformer.named_parameters()}
    for layer, change in one.items():
        expected = before[f"{layer}.weight"] + 0.5 * change + 2.0 * other[layer]
        torch.testing.assert_close(fused[f"{layer}.weight"].data, expected.data, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_merged(runs: dict[str, list[Path]], tmp_path: Path) -> None:
    full, lora = runs["full"], runs["lora"]
    with pytest.raises(RecipeError, match=r"add up to 0\.8 and not to 1"):
        merge.merge(full, [0.5, 0.3], tmp_path / "out")
    with pytest.raises(RecipeError, match="one of the runs trained LoRA and the other all weights"):
        merge.merge([full[0], lora[0]], [0.5, 0.5], tmp_path / "out")
    with pytest.raises(RecipeError, match="no run folder"):
        merge.merge([full[0], tmp_path], [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (["a"], "there is nothing to merge with"),
        (["a", "b", "--weights", "1"], "2 runs need 2 shares, not 1"),
        (["a", "b", "--weights", "1", "nan"], "2 runs need 2 shares, not 1 nan"),
    ],
)
def test_words_that_make_no_mixture(said: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["merge", *said]) != 0
    assert message in capsys.readouterr().err
