"""What is planned against closed numbers, and against what a run's own metrics count."""

import json

import pytest
import torch
from torch import nn

from rlkit import cli, plan_calls, plan_devices, plan_sizes, plan_stage, recipe, registry
from rlkit.errors import RecipeError
from rlkit.weights import Lora

QUICK = (
    *("run.wandb=disabled", "run.threads=1", "stages.main.steps=2", "stages.main.until=null"),
    *("stages.main.evaluate.every=0", "stages.main.evaluate.held_out=0", "stages.main.evaluate.ends=null"),
    *(
        "stages.main.data.per_step=2",
        "stages.main.data.group=4",
        "stages.main.rollout.steps=8",
        "stages.main.expect=null",
    ),
    *("stages.main.learner.decay=null", "stages.main.learner.lr_end=0.0"),
)
TOY = plan_sizes.Size(
    "a toy",
    parameters=1000.0,
    encoders=500.0,
    layers=2,
    width=10,
    tokens=5,
    flops=1e6,
    linears={"a.to_q": (10, 10), "b": (10, 40)},
    pixels=0,
)


def toy(**changed):
    told = {"size": TOY, "lora": None, "bf16": False, "sets": 2, "sets_on_device": True, "micro_batch": 3, "each": 1.0}
    told |= {"passes": 1, "sampled": 4, "pictures": 4, "checkpointing": False, "encoders": "keep"}
    return plan_stage.Footprint(**(told | changed))


def stage_of(name, *changes):
    setup = recipe.read(name, [*QUICK, *changes])
    return setup, setup.stages[0]


# ------------------------------------------------------------------------------------------------- devices


def test_words_for_a_machine():
    assert plan_devices.check("8xH200") == (8, "H200")
    assert plan_devices.check("a100-80") == (1, "A100-80")
    assert plan_devices.machine("64xH100").link == plan_devices.NETWORK
    assert plan_devices.machine("8xH100").link == plan_devices.DEVICES["H100"].link


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(RecipeError, match=r"no device named 'H20'.*Did you mean 'H200'.*Known: H200, H100"):
        plan_devices.check("8xH20")


def test_no_devices_are_refused():
    with pytest.raises(RecipeError, match="no number of devices"):
        plan_devices.check("0xH200")


def test_the_processor_is_measured_and_its_threads_are_put_back():
    before = torch.get_num_threads()
    found = plan_devices.processor(threads=1, seconds=0.02)
    assert torch.get_num_threads() == before
    assert 1e8 < found.fp32 < 1e13
    assert found.memory > 1e8


# --------------------------------------------------------------------------------------------------- sizes


class Streams(nn.Module):
    """A block with a stream for words, and what is computed once a picture."""

    def __init__(self):
        super().__init__()
        self.norm_out = nn.Linear(7, 3)  # once
        self.to_q = nn.Linear(4, 4)
        self.add_q_proj = nn.Linear(4, 4)  # on the words
        self.single = nn.Linear(4, 2)  # on both


def test_flops_of_layers_by_the_tokens_that_they_see():
    once, attention = 2 * 7 * 3, 4 * 8**2 * 4
    assert plan_sizes.row_flops(Streams(), 5, 3) == once + 2 * 16 * 5 + 2 * 16 * 3 + 2 * 8 * 8 + attention


def test_the_shipped_backbone_is_counted_as_torch_counts_it():
    from torch.utils.flop_counter import FlopCounterMode

    backbone = registry.build("backbones", "tiny", {}, "policy.backbone")
    size = plan_sizes.size_of(backbone)
    model = backbone.load(torch.device("cpu"), torch.float32)
    assert size.parameters == sum(one.numel() for one in model.net.parameters())
    assert (size.layers, size.width, size.tokens) == (4, 128, 28)
    cond = {"tokens": torch.zeros(1, 12, 96), "pooled": torch.zeros(1, 96)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.velocity(model.net, torch.zeros(1, 64, 4, 4), torch.zeros(1), cond)
    assert size.flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_published_checkpoint_has_the_parameters_of_its_card():
    backbone = registry.build("backbones", "sd3", {"path": "stabilityai/stable-diffusion-3.5-large"}, "policy.backbone")
    size = plan_sizes.size_of(backbone)
    assert size.parameters == pytest.approx(8.1e9, rel=0.01)
    assert size.tokens == 32 * 32 + 256 + 77


def test_a_card_is_read():
    text = "2.5 B (3.5 medium), 8.1 B (3.5 large)"
    assert plan_sizes.card(text, "x/stable-diffusion-3.5-large") == (8.1e9, 0.0)
    assert plan_sizes.card(text, "mine") == (2.5e9, 0.0)
    assert plan_sizes.card("20 B, and 7 B of text encoder", "") == (20e9, 7e9)
    assert plan_sizes.card("2.3 M", "") == (2.3e6, 0.0)
    assert plan_sizes.card("as its neighbours are wide", "") is None


def test_a_backbone_of_which_nothing_is_known_is_refused():
    with pytest.raises(RecipeError, match="nothing tells how large OneOfMine is"):
        plan_sizes.size_of(type("OneOfMine", (), {})())


def test_adapters_are_counted_on_their_targets():
    assert TOY.trained(Lora(rank=3)) == 3 * 20
    assert TOY.trained(Lora(rank=3, targets=("b",))) == 3 * 50
    assert TOY.trained(None) == 1000


# -------------------------------------------------------------------------------------------------- memory


def test_memory_of_full_training_in_fp32():
    assert toy().memory == {
        "weights": 4000,
        "gradients": 4000,
        "moments": 8000,
        "sets": 8000,
        "activations": 3 * 5 * 10 * 4 * 2 * plan_stage.SAVED,
        "decoding": 0,
        "encoders": 2000,
    }


@pytest.mark.parametrize(
    ("change", "part", "bytes_"),
    [
        ({"passes": 2}, "gradients", 8000),  # what is summed up, and one pass's own
        ({"sets_on_device": False}, "sets", 4000),  # the one that is in use
        ({"encoders": "free"}, "encoders", 0),
        ({"bf16": True, "lora": Lora(rank=3)}, "weights", 4 * 60 + 2 * 1000),
        ({"lora": Lora(rank=3)}, "moments", 8 * 60),
        ({"checkpointing": True}, "activations", 3 * 5 * 10 * 4 * (2 * plan_stage.AGAIN + plan_stage.SAVED)),
        ({"each": 2.0}, "activations", 2 * 3 * 5 * 10 * 4 * 2 * plan_stage.SAVED),
        ({"sampled": 1000}, "activations", 1000 * 5 * 10 * 4 * plan_stage.PASSING),
    ],
)
def test_memory_follows_what_is_chosen(change, part, bytes_):
    assert toy(**change).memory[part] == bytes_


def test_nobody_decodes_while_rows_are_trained_on():
    from dataclasses import replace

    drawing = toy(size=replace(TOY, pixels=100))
    assert drawing.memory["decoding"] == 4 * 100 * plan_stage.DECODING
    assert drawing.total == sum(drawing.memory.values()) - drawing.memory["activations"]


def test_what_does_not_fit_says_what_to_change():
    _, stage = stage_of("quickstart", "stages.main.learner.batch=16")
    found = list(plan_stage.cures(toy(), stage, room=1.0))
    keys = [one.partition("=")[0] for one in found]
    assert keys[:2] == ["run.precision", "policy.encoders"]
    assert "stages.main.learner.micro_batch" in keys
    free = plan_stage.cures(toy(encoders="free", sets=0), stage, room=1.0)
    assert not {"policy.encoders", "policy.sets"} & {one.partition("=")[0] for one in free}  # nothing to gain there
    assert found[-1].endswith("which still does not fit: choose another device")
    fits = list(plan_stage.cures(toy(), stage, room=toy(lora=Lora(rank=32)).total))
    assert any(one.startswith("policy.train.lora") and one.endswith("which fits") for one in fits)


# ---------------------------------------------------------------------------------------------------- time


def test_flops_and_seconds_of_a_step():
    calls = plan_calls.StepCalls(sampled=10, compared=2, trained=4, updates=2)
    assert plan_stage.step_flops(toy(), calls) == 1e6 * (10 + 2 + 3 * 4)
    assert plan_stage.step_flops(toy(checkpointing=True), calls) == 1e6 * (10 + 2 + 4 * 4)
    assert plan_stage.step_flops(toy(lora=Lora(rank=3)), calls) == 1e6 * (10 + 2 + 2 * 4)
    device = plan_devices.Device("toy", 2e6, 1e6, 1e9, 1e6, 1e5, efficiency=0.5)
    seconds = plan_stage.step_seconds(toy(), calls, plan_devices.Machine(device, 2), samples=3)
    busiest = 2 / 3  # two of three samples
    assert seconds["sample"] == pytest.approx(10e6 * busiest / 0.5e6)
    assert seconds["train"] == pytest.approx(14e6 * busiest / 0.5e6)
    assert seconds["update"] == pytest.approx(2 * plan_stage.UPDATE * 1000 / 1e6)
    assert seconds["exchange"] == pytest.approx(2 * 8 * 1000 / 1e5)


# --------------------------------------------------------------------------------------------------- calls

ALIKE = {
    "quickstart": ("stages.main.learner.batch=16", "stages.main.algorithm.window_start=[0, 3]"),
    "world_nft": ("stages.main.learner.batch=8", "stages.main.algorithm.old_decay=slow"),
    "arena_dense_grpo": ("stages.main.learner.batch=16", "stages.main.algorithm.window_start=[0, 3]"),
    "world_dpo": ("stages.main.learner.batch=8", "policy.guidance=2.0"),
    "world_backprop": ("stages.main.learner.batch=4",),
}


@pytest.mark.parametrize("name", ALIKE)
def test_calls_are_those_that_a_run_counts(name, tmp_path):
    changes = [*QUICK, *ALIKE[name], f"run.dir={tmp_path / 'run'}"]
    setup = recipe.read(name, changes)
    planned = plan_calls.rehearse(setup.stages[0], setup.policy.guidance)
    assert cli.main(["train", name, *changes, "--quiet"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    counted = [row["network_calls"] for row in map(json.loads, lines) if row["kind"] == "train"]
    assert [one.total for one in planned.steps] == counted
    assert planned.start == 0


def test_pairs_of_a_data_set_are_not_sampled(tmp_path):
    (tmp_path / "pairs.yaml").write_text(
        """
defaults: [world_dpo, _self_]
stages:
  main:
    rollout: {name: dataset}
    rewards: {composition: {weight: 0.0}}
    algorithm: {pairs: dataset, draws: 3, sigmas: uniform}
    learner: {batch: 6, decay: null, lr_end: 0.0}
"""
    )
    changes = ["stages.main.data={name:pairs,path:nowhere.jsonl,per_step:4,group:2}"]
    stage = recipe.read(str(tmp_path / "pairs.yaml"), changes).stages[0]
    found = plan_calls.rehearse(stage).mean
    assert (found.sampled, found.compared, found.trained, found.updates) == (0, 24, 24, 2)  # 4 pairs x 3 draws x 2


def test_devices_that_cut_a_group_share_less_of_it():
    changes = ("stages.main.learner.batch=16", "stages.main.algorithm.window_start=[2, 2]")
    _, stage = stage_of("quickstart", *changes)
    whole, cut = plan_calls.rehearse(stage).mean, plan_calls.rehearse(stage, devices=4).mean
    assert cut.sampled - whole.sampled == 2 * 3  # three shared steps of two groups, now drawn twice each
    assert cut.trained == whole.trained


def test_calibration_counts_with_the_first_step():
    changes = ("stages.main.learner.batch=16", "stages.main.algorithm.window=2")
    _, stage = stage_of("arena_dense_grpo", *changes, "stages.main.algorithm.calibration=1")
    _, without = stage_of("arena_dense_grpo", *changes)
    assert plan_calls.rehearse(stage).start > 0
    assert plan_calls.rehearse(without).start == 0


# ------------------------------------------------------------------------------------------------- command


def test_the_command_says_what_does_not_fit(capsys):
    changes = ["policy.backbone.name=flux", *QUICK, "stages.main.learner.batch=16"]
    assert cli.main(["plan", "quickstart", *changes, "--gpus", "4xL40S"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("predicted, not measured: 4 x L40S")
    assert "DOES NOT FIT" in said
    assert "policy.train.lora.rank=32" in said
    assert "rewards: composition" in said
    assert "not counted" in said


def test_more_devices_than_samples_are_refused(capsys):
    assert cli.main(["plan", "quickstart", *QUICK, "stages.main.learner.batch=16", "--gpus", "512xH200"]) == 1
    assert "raise stages.main.data.per_step" in capsys.readouterr().out


def test_the_command_as_json(capsys):
    assert cli.main(["plan", "world_nft", *QUICK, "stages.main.learner.batch=8", "--gpus", "4090", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (stage,) = told["stages"]
    assert told["heading"] == "predicted, not measured"
    assert stage["network_calls"]["total"] == pytest.approx(
        sum(stage["network_calls"][name] for name in ("sampled", "compared", "trained"))
    )
    assert stage["hours"] == pytest.approx(2 * stage["step_seconds"] / 3600)


def test_a_policy_of_several_parts_is_not_predicted(capsys):
    assert cli.main(["plan", "world_captioner", "--gpus", "H200"]) == 0
    assert "not predicted: a policy" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--gpus", "8xH20"], ["--gpus", "x"]])
def test_a_bad_device_ends_the_command(words, capsys):
    assert cli.main(["plan", "quickstart", *words]) == 1
    assert "error: --gpus: no device named" in capsys.readouterr().err
