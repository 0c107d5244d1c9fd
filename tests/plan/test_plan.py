"""What is planned against closed numbers, and against what a run's own metrics count."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rlkit import cli, recipe, registry
from rlkit.data.prompts import HubPrompts
from rlkit.errors import RecipeError
from rlkit.plan import answers as plan_answers
from rlkit.plan import calls as plan_calls
from rlkit.plan import devices as plan_devices
from rlkit.plan import memory as plan_memory
from rlkit.plan import sizes as plan_sizes
from rlkit.plan import stage as plan_stage
from rlkit.plan import words as plan_words
from rlkit.types import Prompt
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
    return plan_memory.Footprint(**(told | changed))


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
        "activations": 3 * 5 * 10 * 4 * 2 * plan_memory.SAVED,
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
        ({"checkpointing": True}, "activations", 3 * 5 * 10 * 4 * (2 * plan_memory.AGAIN + plan_memory.SAVED)),
        ({"each": 2.0}, "activations", 2 * 3 * 5 * 10 * 4 * 2 * plan_memory.SAVED),
        ({"sampled": 1000}, "activations", 1000 * 5 * 10 * 4 * plan_memory.PASSING),
    ],
)
def test_memory_follows_what_is_chosen(change, part, bytes_):
    assert toy(**change).memory[part] == bytes_


def test_nobody_decodes_while_rows_are_trained_on():
    drawing = toy(size=replace(TOY, pixels=100))
    assert drawing.memory["decoding"] == 4 * 100 * plan_memory.DECODING
    assert drawing.total == sum(drawing.memory.values()) - drawing.memory["activations"]


def test_what_does_not_fit_says_what_to_change():
    _, stage = stage_of("quickstart", "stages.main.learner.batch=16")
    found = list(plan_memory.cures(toy(), stage, room=1.0))
    keys = [one.partition("=")[0] for one in found]
    assert keys[:2] == ["run.precision", "policy.encoders"]
    assert "stages.main.learner.micro_batch" in keys
    free = plan_memory.cures(toy(encoders="free", sets=0), stage, room=1.0)
    assert not {"policy.encoders", "policy.sets"} & {one.partition("=")[0] for one in free}  # nothing to gain there
    assert found[-1].endswith("which still does not fit: choose another device")
    fits = list(plan_memory.cures(toy(), stage, room=toy(lora=Lora(rank=32)).total))
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


# --------------------------------------------------------------------------------------------- evaluations


def evaluated(setup, known=plan_stage.LIMITS):
    """Seconds of the evaluations of a recipe's first stage on one H200, times its speed: FLOPs."""
    machine = plan_devices.machine("H200", None)
    found = plan_stage.predict(setup, machine, known)[0]
    seconds = found.hours * 3600 - found.steps * found.step_seconds
    return seconds * machine.device.fp32 * machine.device.efficiency


def pictures(*changes, data=None):
    """How many the first and the last evaluation of the quickstart draw, if each takes eight steps."""
    setup, stage = stage_of("quickstart", "stages.main.learner.batch=16", *changes)
    if data is not None:
        setup = replace(setup, stages=(replace(stage, data=data),))
    return evaluated(setup) / 8 / plan_sizes.size_of(setup.policy.backbone).flops


SMALL = (
    *("run.order=[t2i]", "stages.t2i.steps=1", "stages.t2i.data.per_step=1", "stages.t2i.data.group=2"),
    *("stages.t2i.learner.batch=4", "stages.t2i.learner.decay=null", "stages.t2i.learner.lr_end=0.0"),
)


def test_an_evaluation_of_other_stages_takes_their_prompts_their_steps_and_their_rows():
    changes = [*SMALL, "policy.backbone.name=omnigen2", "stages.t2i.evaluate.ends=null"]
    changes += ["stages.t2i.evaluate.every=0", "stages.t2i.evaluate.held_out=8", "stages.edit.evaluate.ends=3"]
    changes += ["stages.edit.evaluate.steps=20", "stages.in_context.evaluate.ends=0"]
    changes += ["stages.in_context.evaluate.held_out=5", "stages.in_context.rollout.steps=7"]
    setup = recipe.read("world_omnigen2", changes)
    plain, edits = (plan_sizes.size_of(setup.policy.backbone, reads_source=one).flops for one in (False, True))
    assert evaluated(setup) == pytest.approx(2 * (8 * 10 + 5 * 7) * plain + 2 * 3 * 20 * edits, rel=1e-6)


def test_without_prompts_of_its_own_a_stage_evaluates_no_other(tmp_path):
    (tmp_path / "train.txt").write_text("a red circle\n")
    data = f"stages.t2i.data={{name:prompts,path:{tmp_path / 'train.txt'},per_step:1,group:2}}"
    assert evaluated(recipe.read("world_omnigen2", [*SMALL, data])) == pytest.approx(0, abs=1)


def test_an_evaluation_of_other_stages_that_write_takes_as_long_as_theirs():
    known = plan_answers.Known(answer=0.5, read=100)
    own = ["stages.rl.evaluate.every=0", "stages.cold_start.evaluate.every=0", "stages.cold_start.evaluate.ends=64"]
    first, alone, both = (
        evaluated(recipe.read("world_agent_grpo", [*own, f"run.order=[{stage}]", *more]), known)
        for stage, *more in (("cold_start",), ("rl",), ("rl", "stages.rl.evaluate.also=[cold_start, rl]"))
    )
    assert both - alone == pytest.approx(first, rel=1e-6)  # the same 64 at both ends
    assert 0 < first < alone / 2


@dataclass(frozen=True)
class Few:
    """Three held-out prompts, whatever is asked for."""

    per_step: int = 2
    group: int = 4

    def open(self):
        return self

    def held_out(self, count):
        return (Prompt(id=0, text=""),) * min(3, count)


def test_an_evaluation_draws_the_prompts_that_there_are(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("a red circle\na blue square\n")
    (tmp_path / "broken.jsonl").write_text("a red circle\n{\n")
    counts = ("stages.main.evaluate.held_out=4", "stages.main.evaluate.ends=5")

    def of(path, *more):
        told = ",".join(("name:prompts", f"path:{tmp_path / path}", "per_step:2", "group:4", *more))
        return pictures(*counts, f"stages.main.data={{{told}}}")

    assert of("train.txt") == pytest.approx(0, abs=1e-6)
    assert of("train.txt", f"held_out_path:{tmp_path / 'test.txt'}") == pytest.approx(2 * 5)  # two, over again
    assert of("missing.txt") == of("broken.jsonl") == pytest.approx(2 * 5)  # nobody can tell
    assert pictures(*counts, data=Few()) == pytest.approx(2 * 3)
    assert pictures(*counts, "stages.main.evaluate.every=1", data=Few()) == pytest.approx(3 * 3)


def test_no_pictures_at_the_ends_are_as_many_as_between():
    assert pictures("stages.main.evaluate.held_out=7", "stages.main.evaluate.ends=0") == pytest.approx(2 * 7)


def test_a_plan_downloads_no_data(monkeypatch):
    def never(*words):
        raise AssertionError("nothing is downloaded")

    monkeypatch.setattr("rlkit.data.prompts.load_table", never)
    hub = "name:hub,path:nobody/nothing,held_out_split:test"
    for told in (hub + ",per_step:2,group:4", f"name:mixture,sources:{{a:{{{hub}}},b:null}},per_step:2,group:4"):
        assert pictures("stages.main.evaluate.held_out=5", f"stages.main.data={{{told}}}") == pytest.approx(2 * 5)
    setup = recipe.read("world_captioner")
    stage = replace(setup.stages[0], data=HubPrompts("nobody/nothing", 2, 4))
    assert plan_answers._prompts(stage, setup.policy.backbone, "") is None


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


def test_the_command_says_how_long_answers_are_taken_to_be(capsys):
    assert cli.main(["plan", "world_captioner", "--answer", "0.5", "--read", "33", "--gpus", "H200"]) == 0
    assert "6 tokens, 0.5 of the limit; 33 are read before (--read)" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--gpus", "8xH20"], ["--gpus", "x"]])
def test_a_bad_device_ends_the_command(words, capsys):
    assert cli.main(["plan", "quickstart", *words]) == 1
    assert "error: --gpus: no device named" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- what is published

CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}


def test_encoders_have_the_parameters_of_their_configurations():
    import transformers

    def count(kind, settings):
        with torch.device("meta"):
            net = kind(settings)
        return sum(one.numel() for one in {id(one): one for one in net.parameters()}.values())

    small = transformers.CLIPTextConfig(**CLIP, hidden_size=768, intermediate_size=3072, projection_dim=768)
    assert count(transformers.CLIPTextModelWithProjection, small) == pytest.approx(plan_sizes.CLIP_L, rel=1e-4)
    big = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    large = transformers.CLIPTextConfig(**CLIP, **big, projection_dim=1280)
    assert count(transformers.CLIPTextModelWithProjection, large) == pytest.approx(plan_sizes.CLIP_BIGG, rel=1e-4)
    xxl = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    t5 = transformers.T5Config(vocab_size=32128, **xxl, feed_forward_proj="gated-gelu")
    assert count(transformers.T5EncoderModel, t5) == pytest.approx(plan_sizes.T5_XXL, rel=1e-4)
    seeing = plan_words.writer(plan_words.WRITERS["Qwen/Qwen2.5-VL-7B-Instruct"])
    assert sum(one.numel() for one in seeing.parameters()) == pytest.approx(plan_sizes.QWEN_VL, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", 2.243e9),  # 2.47 with the table of positions, which does not learn
        ("black-forest-labs/FLUX.1-dev", 11.9e9),
        ("black-forest-labs/FLUX.1-Kontext-dev", 11.9e9),
        ("Qwen/Qwen-Image", 20.4e9),
        ("Alpha-VLLM/Lumina-Image-2.0", 2.6e9),
        ("hunyuanvideo-community/HunyuanImage-2.1-Diffusers", 17.4e9),
        ("jdopensource/JoyAI-Image-Edit-Diffusers", 16.3e9),
        ("Tongyi-MAI/Z-Image", 6.15e9),
    ],
)
def test_published_networks_have_the_parameters_of_their_cards(name, parameters):
    net = plan_sizes.built(plan_sizes.PUBLISHED[name].config())
    assert sum(one.numel() for one in net.parameters()) == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.54e9),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3.75e9),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8.29e9),
        ("Qwen/Qwen3-VL-8B-Instruct", 8.77e9),
    ],
)
def test_published_language_models_have_the_parameters_of_their_cards(name, parameters):
    net = plan_words.writer(plan_words.WRITERS[name])
    assert sum(one.numel() for one in net.parameters()) == pytest.approx(parameters, rel=0.005)


def test_layers_that_make_queries_keys_and_values_at_once_have_an_attention():
    backbone = registry.build("backbones", "joyimage_edit", {"size": [1024, 1024]}, "policy.backbone")
    size = plan_sizes.size_of(backbone, reads_source=True)
    assert (size.layers, size.width, size.tokens) == (40, 4096, 2 * 64**2 + 1024)
    per_layer = 4096 * 3 * 4096 + 4096 * 4096 + 8 * 4096 * 4096  # the same for both streams
    expected = 2 * 40 * per_layer * size.tokens + 4 * 40 * size.tokens**2 * 4096
    assert size.flops == pytest.approx(expected, rel=0.02)
    assert size.trained(Lora(rank=2)) == 40 * 2 * 2 * (4096 + 3 * 4096 + 4096 + 4096)


# ------------------------------------------------------------------------------------------- policies that write

SPEAKER = plan_words.Words(
    "a toy", 1000.0, layers=2, heads=10, kept=6, saved=50.0, width=10, body=400.0, head=100.0, vocabulary=7, linears={}
)
TALK = plan_answers.Conversation(read=20.0, said=10.0, replies=0.0, turns=1, pictures=0, words="")


def spoken(told=TALK, engine=False, **changed):
    given = {"rows": 8, "prompts": 2, "batch": 4, "number": 4} | changed
    return plan_answers.Writing(SPEAKER, told, engine=engine, **given)


def test_flops_of_a_language_model():
    assert SPEAKER.flops(5, 1) == 2 * (400 * 5 + 100) + 4 * 2 * 10 * 25
    assert SPEAKER.flops(1, 1, before=9) == 2 * 500 + 4 * 2 * 10 * 10


def test_the_shipped_captioner_is_counted_as_torch_counts_it():
    from torch.utils.flop_counter import FlopCounterMode

    backbone = registry.build("backbones", "tiny_captioner", {}, "policy.backbone")
    words = plan_words.words_of(backbone)
    model = backbone.load(torch.device("cpu"), torch.float32)
    (cond,) = model.encode([Prompt(id=0, text="", source=torch.rand(3, 32, 32))])
    ids = cond["ids"][None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model.net, ids, torch.ones_like(ids, dtype=torch.bool), model.collate([cond]))
    assert words.flops(ids.shape[1], ids.shape[1], 1) == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert words.parameters == sum(one.numel() for one in model.net.parameters())
    assert int((ids == model.picture).sum()) == words.picture


def test_what_is_said_is_read_once_a_prompt_and_continued_a_token_at_a_time():
    writes = spoken()
    assert writes.reading == 2 * SPEAKER.flops(20, 1)
    assert writes.saying == 8 * 10 * SPEAKER.flops(1, 1, before=25)


def test_an_agent_reads_everything_again_and_vllm_what_is_new():
    told = replace(TALK, replies=6.0, turns=2)  # the second turn: 20 + 5 + 3 tokens stand before, for 3 (half of 6)
    again = spoken(told).reading - spoken(replace(told, turns=1)).reading
    assert again == 8 * SPEAKER.flops(28, 1)
    new = spoken(told, engine=True).reading - spoken(replace(told, turns=1)).reading
    assert new == 8 * SPEAKER.flops(6, 1, before=22)


def test_a_token_takes_as_long_as_its_memory_traffic():
    slow = plan_devices.Device("toy", 1e30, 1e30, 1e9, 1e3, 1e5, efficiency=1.0)
    keys = 4 * 25 * 6 * 2  # rows, tokens, values, layers
    expected = 2 * 10 * 4 * (500 + keys) / (plan_answers.TRAFFIC * 1e3)  # two batches of ten tokens
    assert spoken(engine=True).seconds(slow, 1e30) == pytest.approx(expected)
    more = 2 * 10 * (4 * 2 * keys / (plan_answers.TRAFFIC * 1e3) + 2 * plan_answers.EAGER)
    assert spoken().seconds(slow, 1e30) - expected == pytest.approx(more)
    assert spoken().seconds(slow, 1e3) > 80 * 1.0  # and no less than its arithmetic


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ([], ["--answer", "0"], "--answer is a share above 0"),
        ([], ["--answer", "1.5"], "--answer is a share above 0"),
        ([], ["--read", "0"], "--read must be 1 token or more"),
        ([], ["--turns", "0.5"], "--turns must be 1 or more"),
        ([], ["--drawn", "0"], "--drawn is a share above 0"),
    ],
)
def test_lengths_that_cannot_be_are_refused(changes, words, message, capsys):
    assert cli.main(["plan", "world_captioner", *changes, *words, "--gpus", "H200"]) == 1
    assert message in capsys.readouterr().err


def conversation_of(name, known, stage=0):
    setup = recipe.read(name)
    backbone = setup.policy.backbone or setup.policy.parts["captioner"]
    words = plan_words.words_of(backbone)
    return plan_answers.conversation(setup.stages[stage], backbone, words, known)


def test_answers_are_as_long_as_the_recipe_lets_them():
    found = conversation_of("world_captioner", plan_answers.Known())
    assert (found.said, found.pictures, found.turns) == (12, 1, 1)
    assert 16 < found.read < 40
    half = conversation_of("world_captioner", plan_answers.Known(answer=0.5, read=30))
    assert (half.read, half.said, half.total) == (30, 6, 36)


def test_an_agent_speaks_in_turns_within_what_it_can_read():
    found = conversation_of("world_agent_grpo", plan_answers.Known(read=100), stage=1)
    assert (found.said, found.replies, found.turns) == (4 * 48, 0, 4)
    full = conversation_of("world_agent_grpo", plan_answers.Known(), stage=1)
    assert full.total == 512


def predicted(name, *changes, gpus="H200", known=plan_stage.LIMITS):
    setup = recipe.read(name, list(changes))
    return plan_stage.predict(setup, plan_devices.machine(gpus), known)


def test_calls_of_a_policy_that_writes_are_a_runs():
    (found,) = predicted("world_captioner", known=plan_answers.Known(answer=0.5))
    assert found.calls.total == 256 * 6 + 256  # tokens, and rows that are learnt from
    demonstrated, learnt = predicted("world_agent_grpo", known=plan_answers.Known(answer=0.25, read=100))
    assert demonstrated.calls.total == 32 * 10 + 32  # the teacher's are not written; its pictures are drawn
    assert "write" not in demonstrated.seconds
    assert learnt.calls.total == 48 * 48 + 48 * 10 + 2 * 48  # with the reference's


def test_each_stage_of_a_policy_of_parts_has_its_own_work():
    cold, understanding, generation = predicted("world_unified")
    assert cold.calls.total == 64 * 12 + 64 + 64 * 8 + 64  # captions, read again, drawn in eight steps, learnt from
    assert understanding.calls.total == 192 * 12 + 192 + 192 * 2 * 8 + 2 * 192
    assert understanding.size.learns == 128 * 425  # the output layer alone
    assert generation.calls.trained == 192 * 2
    assert generation.memory["others"] > 4e6  # the captioner's weights


def test_what_is_known_of_an_agents_turns_and_of_its_pictures():
    known = plan_answers.Known(answer=0.5, read=100, turns=2.5, drawn=0.25)
    found = conversation_of("world_agent_grpo", known, stage=1)
    assert (found.said, found.turns) == (2.5 * 24, 2.5)
    assert conversation_of("world_agent_grpo", plan_answers.Known(read=100, turns=9), stage=1).turns == 4, "its limit"
    demonstrated, learnt = predicted("world_agent_grpo", known=known)
    assert demonstrated.calls.sampled == 32 * 10, "a teacher's answers are all drawn"
    assert learnt.calls.sampled == 48 * 60 + 48 * 10 * 0.25
    _, understanding, generation = predicted("world_unified", known=plan_answers.Known(drawn=0.5))
    assert understanding.calls.sampled == 192 * 12 + 192 + 192 * 2 * 8 / 2
    (alike,) = (one for one in predicted("world_unified") if one.stage == "generation")
    assert generation.calls == alike.calls, "a prompt has one caption, which is drawn"


def test_half_of_the_rows_may_have_another_turn():
    two, three = (spoken(replace(TALK, turns=turns)).reading for turns in (2.0, 3.0))
    third = 8 * SPEAKER.flops(20 + 2 * 10 / 2.5, 1)  # of ten tokens in two and a half turns, two turns stand before
    second = 8 * SPEAKER.flops(20 + 10 / 2.5, 1)
    assert spoken(replace(TALK, turns=2.5)).reading == pytest.approx(spoken().reading + second + third / 2)
    assert spoken().reading < two < three


def test_pictures_of_an_evaluation_take_the_steps_that_it_says():
    """Of words too: their stage may draw with fewer steps than it evaluates with."""
    few, many = (
        predicted("world_unified", "run.order=[understanding]", f"stages.understanding.evaluate.steps={steps}")[0]
        for steps in (8, 16)
    )
    assert few.step_seconds == many.step_seconds
    size = plan_sizes.size_of(recipe.read("world_unified").policy.parts["generator"])
    device = plan_devices.machine("H200", None).device
    pictures = 2 * (2 * 1024 + 2 * 256)  # two of each caption
    assert (many.hours - few.hours) * 3600 == pytest.approx(pictures * 8 * size.flops / device.fp32 / device.efficiency)


def test_the_first_step_of_words_is_the_first(monkeypatch):
    steps = (plan_calls.StepCalls(trained=1.0), plan_calls.StepCalls(trained=3.0))
    monkeypatch.setattr(plan_calls, "rehearse", lambda *_: plan_calls.StageCalls(5, steps))
    (found,) = predicted("world_captioner")
    assert found.calls.trained == 2
    assert found.first_calls == 5 + found.calls.sampled + 1


def test_logits_are_what_long_answers_take():
    toys = toy(size=SPEAKER.row(30, 30, 0), sampled=0)
    assert toys.memory["logits"] == 30 * 7 * (3 * 4 * 3 + 12)
    assert toys.memory["activations"] == 3 * 30 * 4 * 2 * 50
    assert "logits" not in toy(size=SPEAKER.row(30, 1, 0)).memory
    assert toy(size=SPEAKER.row(30, 30, 0), cached=5).memory["cache"] == 5 * 30 * 6 * 2 * 4


def test_vllm_takes_its_share_and_an_engine_has_one_learner():
    changes = ["stages.main.rollout={name:vllm,most:12}", "stages.main.algorithm.importance=truncate"]
    (alone,) = predicted("world_captioner", *changes)
    assert alone.memory["engine"] == 0.4 * plan_devices.DEVICES["H200"].memory
    assert not alone.advice
    (several,) = predicted("world_captioner", *changes, gpus="8xH200")
    assert several.advice == (plan_stage.SERVERS,)
    (served,) = predicted("world_captioner", *changes, "stages.main.rollout.urls=[http://a]", gpus="8xH200")
    assert "engine" not in served.memory
    assert not served.advice
    assert alone.calls.compared == 256  # the trainer's own log-probs


def test_whom_an_algorithm_would_ask_is_not_opened():
    _, learnt = predicted("world_agent_sdl", "stages.rl.algorithm.embedding={name:model,path:/nowhere}")
    assert learnt.calls.trained == 48


def test_a_language_model_of_which_nothing_is_known_is_refused():
    with pytest.raises(RecipeError, match=r"nothing tells how large some/where is.*Qwen/Qwen3-VL-8B-Instruct"):
        plan_words.words_of(registry.build("backbones", "qwen", {"path": "some/where"}, "policy.backbone"))


# ------------------------------------------------------------------------------------------------ what docs say


def rows_of_docs(name):
    """(devices, stage, GB, seconds, hours) of the rows that name a recipe and a stage."""
    text = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()
    cells = [[one.strip() for one in line.strip("|").split("|")] for line in text.splitlines() if f"| `{name}`" in line]
    return [(int(one[1]), one[0].rpartition(" ")[2], *map(float, (one[2], one[5], one[7]))) for one in cells]


def test_the_table_is_what_the_command_gives():
    rows = rows_of_docs("genevolve")
    assert len(rows) == 4
    known = plan_answers.Known(answer=0.1, read=6144)
    for devices in {row[0] for row in rows}:
        found = {one.stage: one for one in predicted("genevolve", gpus=f"{devices}xH200", known=known)}
        for _, stage, memory, seconds, hours in (row for row in rows if row[0] == devices):
            assert found[stage].total / 1e9 == pytest.approx(memory, abs=1)
            assert found[stage].step_seconds == pytest.approx(seconds, rel=0.02)
            assert found[stage].hours == pytest.approx(hours, rel=0.02)
