"""Recipes: what is merged from where, what is refused, and whether the message says what, where and what instead."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from rlkit import recipe, recipe_course, registry, sources
from rlkit.data.prompts import PairFile, WorldPrompts
from rlkit.errors import DataError, PluginError, RecipeError, RlkitError
from rlkit.rollouts.dataset import Dataset
from rlkit.stages import Carry
from rlkit.total import Gate, Total
from rlkit.types import Needs

QUICKSTART = registry.recipes()["quickstart"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Recipes are found from any working directory, and files of the user's from this one."""
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(RlkitError) as caught:
        recipe.read(name, overrides)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- what is merged


@pytest.mark.parametrize("name", registry.recipes())
def test_every_recipe_is_sound_and_opens_with_its_command(name):
    setup = recipe.read(name)
    assert [stage.name for stage in setup.stages] == list(recipe_course.running(setup.recipe))
    comment = [line for line in registry.recipes()[name].read_text().splitlines() if line.startswith("#")]
    assert f"#   rlkit train {name}" in comment


@pytest.mark.parametrize("name", registry.recipes())
def test_a_resolved_recipe_resolves_to_the_same_setup(name):
    setup = recipe.read(name)
    text = yaml.safe_dump(setup.recipe, sort_keys=False)  # what a run folder holds
    assert recipe.read(write("recipe.yaml", text)) == setup


def test_the_resolved_recipe_has_every_option_with_its_value():
    setup = recipe.read("quickstart")
    stage = setup.stages[0]
    for entry, plain in ((stage.algorithm, "algorithm"), (stage.rollout, "rollout"), (stage.learner, "learner")):
        written = setup.recipe["stages"]["main"][plain]
        assert {field.name for field in dataclasses.fields(entry)} == written.keys() - {"name"}
    assert setup.recipe["run"].keys() == {field.name for field in dataclasses.fields(setup.options)}


def test_a_users_file_extends_a_built_in_recipe():
    name = write(
        "mine.yml",
        "defaults: [quickstart, _self_]\n"
        "run: {seed: 7}\n"
        "stages:\n"
        "  main:\n"
        "    learner: {lr: 1e-4}\n"
        "    rewards: {composition: 0.5}\n",
    )
    ours, theirs = recipe.read("quickstart").recipe, recipe.read(name).recipe
    assert theirs["run"]["seed"] == 7
    main = theirs["stages"]["main"]
    assert main["learner"]["lr"] == 1e-4  # plain YAML reads text here
    assert main["rewards"] == {"composition": {"weight": 0.5, "score": "mixed", "by": "prompt"}}
    assert main["algorithm"] == ours["stages"]["main"]["algorithm"]


def test_a_file_may_have_the_name_of_the_recipe_that_it_extends():
    write("quickstart.yaml", "defaults: [quickstart]\nrun: {seed: 3}\n")
    assert recipe.compose("./quickstart.yaml")["run"]["seed"] == 3
    assert recipe.compose("quickstart")["run"]["seed"] == 0


def test_files_extend_their_neighbours_and_the_last_word_wins():
    Path("deep").mkdir()
    write("deep/a.yaml", "defaults: [quickstart]\nrun: {seed: 1, threads: 1}\n")
    write("deep/b.yaml", "defaults: [a, _self_]\nrun: {seed: 2}\n")
    write("deep/c.yaml", "defaults: [_self_, ./a]\nrun: {seed: 2}\n")
    run = recipe.compose("deep/b.yaml")["run"]
    assert (run["seed"], run["threads"], run["deterministic"]) == (2, 1, False)
    assert recipe.compose("deep/c.yaml")["run"]["seed"] == 1


def test_stages_are_added_in_order_and_taken_away_with_null():
    second = yaml.safe_dump(recipe.read("quickstart").recipe["stages"]["main"])
    text = "defaults: [quickstart]\nstages:\n  more:\n" + "".join(f"    {line}\n" for line in second.splitlines())
    assert [stage.name for stage in recipe.read(write("two.yaml", text)).stages] == ["main", "more"]
    assert [stage.name for stage in recipe.read("two.yaml", ["stages.main=null"]).stages] == ["more"]
    assert [stage.name for stage in recipe.read("two.yaml", ["~stages.main"]).stages] == ["more"]


def test_options_belong_to_the_name_that_they_were_written_beside(tmp_path):
    (tmp_path / "an_other_algorithm.py").write_text(
        "from dataclasses import dataclass\n"
        "from rlkit.types import Algorithm, Needs\n"
        "@dataclass(frozen=True)\n"
        "class Other(Algorithm):\n"
        "    strength: float = 1.0\n"
        "    def needs(self):\n"
        "        return Needs()\n"
    )
    name = write("other.yaml", "defaults: [quickstart]\nstages: {main: {algorithm: an_other_algorithm:Other}}\n")
    plain = {"name": "an_other_algorithm:Other", "strength": 1.0}
    assert recipe.read(name).recipe["stages"]["main"]["algorithm"] == plain
    changed = ["stages.main.algorithm.strength=2", "stages.main.algorithm.name=an_other_algorithm:Other"]
    assert recipe.read("quickstart", changed).recipe["stages"]["main"]["algorithm"] == plain | {"strength": 2.0}


def test_lora_takes_the_place_of_full_training_and_back():
    assert recipe.read("quickstart").policy.lora is None
    assert recipe.read("quickstart", ["policy.train.lora.rank=8"]).policy.lora.rank == 8
    name = write("lora.yaml", "defaults: [quickstart]\npolicy: {train: {lora: {}}}\n")
    assert recipe.read(name).recipe["policy"]["train"] == {"lora": {"rank": 16, "alpha": None, "targets": None}}
    assert recipe.read(name, ["policy.train.full=true"]).policy.lora is None


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("stages.main.algorithm.clip=1e-3", "stages main algorithm clip", 1e-3),
        ("stages.main.learner.micro_batch=64", "stages main learner micro_batch", 64),  # set by no file
        ("++stages.main.algorithm.kl=0.1", "stages main algorithm kl", 0.1),
        ("~stages.main.algorithm.clip", "stages main algorithm clip", None),  # its default
        ("stages.main.algorithm={clip: 0.5}", "stages main algorithm clip", 0.5),
        ("stages.main.rewards.composition=0.5", "stages main rewards composition weight", 0.5),
        ("stages.main.expect.held_out/strict=> before", "stages main expect held_out/strict", "> before"),
        ("run.dir=/tmp/a (copy), b=c", "run dir", "/tmp/a (copy), b=c"),
        ("stages.main.steps=${run.checkpoint_every}", "stages main steps", 25),
        ("stages.main.data.kinds=[single, two]", "stages main data kinds", ["single", "two"]),
    ],
)
def test_overrides(override, path, value):
    found = recipe.read("quickstart", [override]).recipe
    for key in path.split():
        found = found[key]
    assert found == value


def test_the_last_override_of_a_key_wins_and_mappings_merge():
    values = recipe.compose("quickstart", ["run={seed: 1, threads: 1}", "run.seed=2", "run={seed: 3}"])
    assert (values["run"]["seed"], values["run"]["threads"]) == (3, 1)


# ------------------------------------------------------------------------------------------- what is refused

FILES = {  # text, then the words of the message
    "a YAML error": ("run:\n  seed: 1\n  dir: {a\n", "bad.yaml:", "not YAML"),
    "a tab": ("run:\n\tseed: 1\n", "bad.yaml:2:1", "not YAML"),
    "a key twice": ("run: {seed: 1}\nrun: {seed: 2}\n", "bad.yaml:2:1", "duplicate key"),
    "no mapping": ("- quickstart\n", "bad.yaml", "keys: run, policy, stages"),
    "an empty file": ("", "bad.yaml", "keys: run, policy, stages"),
    "a number for a key": ("defaults: [quickstart]\nstages: {1: null}\n", "bad.yaml:2", "in quotes"),
    "a missing parent": ("defaults: [quickstrat]\n", "bad.yaml:1: defaults", "'quickstrat'", "'quickstart'"),
    "a missing neighbour": ("defaults: [./bat]\n", "bad.yaml:1: defaults", "bat.yaml", "'bad.yaml'"),
    "a group of configs": ("defaults:\n- algorithm: x\n", "bad.yaml:1: defaults", "list of recipes"),
    "itself": ("defaults: [./bad]\n", "bad.yaml", "extends itself"),
    "a key at the top": ("defaults: [quickstart]\nstagess: {}\n", "bad.yaml:2: stagess", "'stages'"),
    "a key in a stage": (
        "defaults: [quickstart]\nstages:\n  main:\n    step: 3\n",
        "bad.yaml:4: stages.main.step",
        "'steps'",
    ),
    "an option": (
        "defaults: [quickstart]\nstages:\n  main:\n    algorithm:\n      clipp: 1\n",
        "bad.yaml:5: stages.main.algorithm",
        "'clipp'",
        "'clip'",
    ),
    "a wrong type": (
        "defaults: [quickstart]\nstages:\n  main:\n    algorithm: {\n      clip: tiny}\n",
        "bad.yaml:5: stages.main.algorithm.clip",
        "a number",
    ),
    "a type of the base": ("defaults: [quickstart]\nrun: 3\n", "bad.yaml:2: run", "mapping"),
    "a half stage": ("defaults: [quickstart]\nstages: {more: {steps: 3}}\n", "bad.yaml:2: stages.more", "algorithm"),
    "no stage": ("policy: {backbone: tiny}\n", "bad.yaml: stages", "needs a stage"),
    "no backbone": ("stages: {}\n", "policy.backbone", "tiny"),
    "full and LoRA": (
        "defaults: [quickstart]\npolicy: {train: {full: true, lora: {rank: 4}}}\n",
        "bad.yaml:2: policy.train",
        "one of",
    ),
    "a reference to nothing": (
        "defaults: [quickstart]\nrun:\n  seed: ${run.sed}\n",
        "bad.yaml:3: run.seed",
        "'run.sed'",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_used(case):
    text, *words = FILES[case]
    message = refusal(write("bad.yaml", text))
    assert all(word in message for word in words), message


OVERRIDES = {  # override, then the words of the message
    "no value": ("run.seed", "'run.seed' is not key=value"),
    "an empty value": ("run.dir=", "run.dir", "null"),
    "two values": ("run.seed=1,2", "run.seed", "[1,2]"),
    "an open bracket": ("run.seed=[1", "run.seed", "'[1'"),
    "a short key": ("steps=3", "'steps'", "'stages.main.steps'"),
    "a typing error at the top": ("polisy.train=null", "'polisy.train'", "'policy.train'"),
    "a stage": ("stages.mian.steps=3", "'mian'", "'main'"),
    "an option of a run": ("run.sed=3", "run", "'sed'", "'seed'"),
    "an option of an algorithm": ("stages.main.algorithm.clipp=1", "stages.main.algorithm", "'clipp'", "'clip'"),
    "an option of a reward": ("stages.main.rewards.composition.scor=strict", "composition", "'scor'", "'score'"),
    "an option of the data": ("stages.main.data.groups=4", "stages.main.data", "'groups'", "'group'"),
    "an option of the evaluation": ("stages.main.evaluate.evry=4", "stages.main.evaluate", "'evry'", "'every'"),
    "several parts": ("policy.parts.a.backbone=tiny", "policy.parts", "policy.backbone"),
    "a removed key that is not there": ("~stages.main.learner.l", "removes", "'stages.main.learner.lr'"),
    "a wrong type": ("stages.main.steps=many", "stages.main.steps", "a whole number", "'many'"),
    "a number in quotes": ("stages.main.learner.lr='1e-4'", "stages.main.learner.lr", "without quotes"),
    "a wrong word": ("run.precision=fp16", "run.precision", "'fp16'", "'bf16'"),
    "an unknown reward": ("stages.main.rewards.compositoin=1", "rewards.compositoin", "'composition'"),
    "an unknown backbone": ("policy.backbone.name=tinny", "policy.backbone", "'tinny'", "'tiny'"),
    "an unknown algorithm": ("stages.main.algorithm.name=flow_grop", "'flow_grop'", "'flow_grpo'"),
    "an unknown rollout": ("stages.main.rollout.name=loca", "stages.main.rollout", "'local'"),
    "unknown data": ("stages.main.data.name=wrld", "stages.main.data", "'wrld'", "'world'"),
    "a class that is not there": ("stages.main.rewards.no.such:Thing=1", "no.such:Thing", "no module 'no'"),
    "a weight": ("stages.main.rewards.composition.weight=high", "composition.weight", "'high'"),
    "a weight that is no number": ("stages.main.rewards.composition.weight=nan", "composition.weight", "number"),
    "a negative prompt without guidance": ("policy.negative=blurry", "policy.negative", "policy.guidance"),
    "a negative prompt that is no text": ("policy={negative: 3, guidance: 2}", "policy.negative", "text, not 3"),
    "checkpointing that is no choice": ("policy.checkpointing=3", "policy.checkpointing", "true or false, not 3"),
    "a folder of conditions that is none": ("policy.conditions=3", "policy.conditions", "a folder, not 3"),
    "a shift that is no number": ("stages.main.rewards.composition.shift=inf", "composition", "shift", "finite"),
    "a scale of 0": ("stages.main.rewards.composition.scale=0", "composition", "scale must not be 0"),
    "a clip the wrong way": ("stages.main.rewards.composition.clip=[1,0]", "composition", "clip must be [least, most]"),
    "no sample a call": ("stages.main.rewards.composition.batch=0", "rewards.composition", "batch must be 1 or more"),
    "a weight for what is only watched": (
        *("stages.main.rewards.composition.when=evaluation", "composition", "its weight is 0. Leave the weight out"),
    ),
    "a reward under another name": ("stages.main.rewards.strict.reward=compositoin", "'compositoin'", "'composition'"),
    "a form": ("stages.main.total.form=geometric", "total.form", "'geometric_mean', 'product'"),
    "a gate without a condition": ("stages.main.total.gates=[{when: strict, at_most: 0}]", "total", "no condition"),
    "a gate over nothing": (
        *("stages.main.total.gates=[{when: 'composition/strct < 1', at_most: 0}]", "total.gates[0].when"),
        *("'composition/strct'", "Did you mean 'composition/strict'"),
    ),
    "a total that is taken apart": (
        *("stages.main={algorithm: {advantage: gdpo}, total: {form: minimum}}", "stages.main.total", "gdpo"),
    ),
    "a product of what may be negative": (
        *("stages.main={total: {form: product}, rewards: {composition: {shift: 0.5}}}", "total.form"),
        *("composition goes down to -0.5", ".clip: [0.0, 1.0]"),
    ),
    "an exponent below 0": (
        *(
            "stages.main={total: {form: product}, rewards: {composition: {weight: -1}}}",
            "composition.weight",
            "above 0",
        ),
    ),
    "no weight above 0": ("stages.main.rewards.composition=0", "stages.main.rewards", "all weights are 0"),
    "no reward": ("stages.main.rewards.composition=null", "stages.main.rewards", "needs a reward"),
    "groups of one": ("stages.main.data.group=1", "stages.main.data.group", "2 or more, not 1"),
    "no prompts": ("stages.main.data.per_step=0", "stages.main.data", "per_step", "1 prompt or more"),
    "a batch that does not divide": ("stages.main.learner.batch=100", "learner.batch", "384 rows", "96 or 128"),
    "a batch above the rows": ("stages.main.learner.batch=1000", "learner.batch", "384 rows", "Use 384"),
    "no noise": ("stages.main.algorithm.noise_level=0", "stages.main.algorithm", "noise_level must be above 0"),
    "an ODE": ("stages.main.algorithm.dynamics=ode", "algorithm.dynamics", "'flow', 'dance', 'cps', not 'ode'"),
    "a window past the end": ("stages.main.algorithm.window_start=[0,9]", "algorithm", "after step 10", "at 8"),
    "a moving window without a length": (
        *("stages.main.algorithm={window: null, tail: null}", "algorithm", "needs a length"),
    ),
    "too few sampling steps": ("stages.main.rollout.steps=3", "stages.main.rollout.steps", "after step 3"),
    "no steps": ("stages.main.steps=0", "stages.main", "steps must be 1 or more, not 0"),
    "a rule": ("stages.main.expect.held_out/strict=up", "expect.held_out/strict", "'up' is no rule", "before"),
    "a limit that nothing measures": ("stages.main.until={metric: strict, above: 1}", "until.metric", "held_out/"),
    "a limit that no reward gives": (
        *("stages.main.until={metric: held_out/stric, above: 1}", "until.metric", "Did you mean 'strict'"),
        "held_out/graded",
    ),
    "a limit without evaluations": (
        *("stages.main={until: {metric: held_out/strict, above: 1}, evaluate: {every: 0}}", "until.metric"),
        "nothing is evaluated before its last step",
    ),
    "a limit on a kind that is none": (
        *("stages.main.until={metric: held_out/strict/singel, above: 1}", "until.metric", "Did you mean 'single'"),
        "single, two, relation, count, place",
    ),
    "a limit on a standard error that is none": (
        *("stages.main.until={metric: held_out/strict/single_se, above: 1}", "until.metric", "Did you mean 'single'"),
    ),
    "a best that no reward gives": ("stages.main.monitors.best_by=held_out/stric", "best_by", "Did you mean 'strict'"),
    "a best of a kind that is none": (
        *("stages.main.monitors.best_by=held_out/strict/singel", "monitors.best_by", "Did you mean 'single'"),
    ),
    "nothing to roll back to": (
        "stages.main={monitors: {colour: {action: roll_back}}, evaluate: {held_out: 0, ends: null}}",
        *("stages.main.monitors.colour.action", "the stage makes none", "stages.main.evaluate.held_out"),
    ),
    "no time": ("stages.main.until={metric: seconds, above: 0}", "stages.main.until", "`above` must be above 0"),
    "a limit that is no number": ("stages.main.until={metric: held_out/strict, above: nan}", "until", "finite", "nan"),
    "a limit of nothing": ("stages.main.until={above: 0.5}", "stages.main.until", "no metric", "{metric: held_out/"),
    "two limits": ("stages.main.until={metric: held_out/strict, above: 1, plateau: 2}", "until", "one of `above`"),
    "a plateau of time": ("stages.main.until={metric: seconds, plateau: 2}", "until", "always rises"),
    "nothing to carry": ("stages.main.carry={optimizer: true}", "stages.main.carry", "none before it"),
    "another network for a stage": (
        *("stages.main.policy.backbone.name=sd3", "stages.main.policy", "one network", "path: RUN/weights"),
    ),
    "another backbone for a stage": ("stages.main.backbone=sd3", "stages.main.backbone", "one network"),
    "a stage that is none": ("run.order=[main,mian]", "run.order", "Did you mean 'main'"),
    "a stage that is not evaluated": ("stages.main.evaluate.also=[mian]", "evaluate.also", "Did you mean 'main'"),
    "half a limit": ("stages.main.until={metric: held_out/strict}", "stages.main.until", "one of `above`"),
    "a device": ("run.device=cpuu", "run", "device must be auto, cpu, cuda, mps", "not 'cpuu'. Did you mean 'cpu'"),
    "a device under another name": ("run.device=gpu:1", "run", "cuda:N", "not 'gpu:1'. Did you mean 'cuda'"),
    "no checkpoints": ("run.checkpoint_every=0", "run", "checkpoint_every must be 1 or more"),
    "a share above 1": ("run.max_unscored=2", "run", "max_unscored", "0..1"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_command_line_that_cannot_be_used(case):
    override, *words = OVERRIDES[case]
    message = refusal("quickstart", override)
    assert message.startswith("command line: ")
    assert all(word in message for word in words), message
    assert not re.search(r"\b(hydra|omegaconf|override|interpolation|struct)", message.lower())


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "mps", "cuda:1", "mps:0"])
def test_devices(device):
    assert recipe.read("quickstart", [f"run.device={device}"]).options.device == device


def test_a_stage_that_is_switched_off_has_no_keys():
    name = write("off.yaml", "defaults: [world_unified]\nstages:\n  understanding: null\n")
    key = "stages.understanding.steps"
    message = refusal(name, f"{key}=3")
    assert message.startswith(f"command line: {key}: stage 'understanding' is switched off (null) by off.yaml:3.")
    assert message.endswith("Stages: cold_start, generation.")
    assert "by an earlier word" in refusal("world_unified", "stages.understanding=null", f"{key}=3")
    assert "no stage 'understandin'. Stages:" in refusal(name, "stages.understandin.steps=3"), "it is not near"
    setup = recipe.read("world_unified", [f"{key}=3", "stages.understanding=null"])
    assert [stage.name for stage in setup.stages] == ["cold_start", "generation"], "the last word wins"


def renamed(name: str) -> str:
    """A recipe whose one stage has this name."""
    plain = recipe.read("quickstart").recipe
    return write("named.yaml", yaml.safe_dump({**plain, "stages": {name: plain["stages"]["main"]}}))


@pytest.mark.parametrize("name", ["1", "1st", "a b", "a/b", "a.b", "été", "a\n", ""])
def test_a_stage_has_a_plain_name(name):
    """It becomes part of columns, files and overrides."""
    message = refusal(renamed(name))
    assert "letters, digits, _ and -, and begins with a letter or _" in message


@pytest.mark.parametrize("name", ["_", "t2i", "text-to-image_2"])
def test_a_stage_with_a_plain_name_is_found_by_it(name):
    composed = recipe.compose(renamed(name))
    words = [*recipe_course.left_out(composed, None, name), f"stages.{name}.steps=3"]
    assert [(one.name, one.steps) for one in recipe.read("named.yaml", words).stages] == [(name, 3)]


@pytest.mark.parametrize("task", ["t2i", "edit", "in_context", "caption", "agent"])
def test_the_kinds_of_the_worlds_tasks_are_those_of_its_held_out_prompts(task):
    data = WorldPrompts(1, 2, task=task)
    assert {prompt.kind for prompt in data.held_out(64)} == set(recipe_course._kinds(data) or ())


def test_kinds_that_only_the_prompts_know_are_not_looked_into():
    data = "{name: prompts, path: a.txt, held_out_path: b.txt, per_step: 12, group: 16}"
    limit = "{metric: held_out/strict/anything, above: 0.5}"
    assert recipe.read("quickstart", [f"stages.main={{data: {data}, until: {limit}}}"]).stages[0].until is not None
    assert recipe_course._kinds(PairFile("a.jsonl", 1, held_out_path="b.txt")) is None
    assert "single" in (recipe_course._kinds(PairFile("a.jsonl", 1, held_out_split="held_out")) or ())


def test_a_limit_may_be_of_one_kind_a_standard_error_or_a_plateau_within_reach():
    for limit in (
        "held_out/strict/single, above: 0.5",
        "held_out/strict_se, above: 0.5",
        "held_out/strict, plateau: 2",
    ):
        assert recipe.read("quickstart", [f"stages.main.until={{metric: {limit}}}"]).stages[0].until is not None


def test_a_monitor_may_roll_back_where_only_the_ends_are_evaluated():
    words = "monitors: {colour: {action: roll_back}}, evaluate: {held_out: 0, ends: 8}"
    assert recipe.read("quickstart", [f"stages.main={{{words}}}"]).stages[0].monitors.rolls_back


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("run.seed", ["'run.seed' is a key", "run.seed=VALUE"]),
        ("stages.main.expect.held_out/strict", ["is a key, and lacks its =value"]),
        ("run.yaml", ["no file 'run.yaml'"]),
        ("quickstrat", ["no recipe named 'quickstrat'", "'quickstart'", "./quickstrat.yaml"]),
        ("./mane.yaml", ["no file './mane.yaml'", "'mine.yaml'"]),
        (".", ["is a folder", "--resume"]),
    ],
)
def test_a_recipe_that_is_not_there(name, words):
    write("mine.yaml", "defaults: [quickstart]\n")
    message = refusal(name)
    assert all(word in message for word in words), message


def test_an_error_names_the_line_of_the_file_that_caused_it():
    name = write("mine.yaml", "defaults: [quickstart]\nrun: {seed: 1}\nstages:\n  main:\n    learner: {batch: 100}\n")
    assert refusal(name, "stages.main.learner.lr=1").startswith("mine.yaml:5: stages.main.learner.batch: 100 ")
    line = next(i for i, text in enumerate(QUICKSTART.read_text().splitlines(), 1) if "learner:" in text)
    composed = sources.compose("quickstart", ["run.seed=1"])
    error = RecipeError("must be 1.", where="stages.main.learner.batch")
    assert composed.place(error) == f"{QUICKSTART}:{line}: stages.main.learner.batch"


def test_prompts_are_not_read_before_they_are_needed():
    override = "stages.main.data={name: prompts, path: nowhere.txt, per_step: 12, group: 16}"
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        recipe.read("quickstart", [override]).stages[0].data.open()


# ------------------------------------------------------------------------------- what does not fit together


@dataclasses.dataclass(frozen=True)
class _Reads:
    reads = ("prompt", "source image")


@dataclasses.dataclass(frozen=True)
class _Smooth:
    reads = ("prompt",)
    differentiable = True


@dataclasses.dataclass(frozen=True)
class _Asks:
    """An algorithm that asks for something."""

    wants: Needs

    def needs(self) -> Needs:
        return self.wants


@dataclasses.dataclass(frozen=True)
class _EndsOnly:
    kind = "flow"
    gives = ()
    steps: int = 10


@dataclasses.dataclass(frozen=True)
class _Words:
    kind = "tokens"
    gives = ("path", "log_prob")
    steps: int = 10


def misfit(**changes):
    """The message for the quickstart's stage with some parts replaced."""
    setup = recipe.read("quickstart")
    stage = dataclasses.replace(setup.stages[0], **changes)
    with pytest.raises(RecipeError) as caught:
        recipe.check(dataclasses.replace(setup, stages=(stage,)))
    return str(caught.value)


def test_the_kinds_have_to_fit():
    assert misfit(algorithm=_Asks(Needs(kind="tokens"))).startswith("policy.backbone: is for flow, but")
    assert misfit(rollout=_Words()).startswith("stages.main.rollout: is for tokens, but")


def test_the_rollout_has_to_give_what_the_algorithm_needs():
    message = misfit(rollout=_EndsOnly())
    assert message.startswith("stages.main.rollout: the algorithm needs path and log_prob")
    assert "previews" in misfit(algorithm=_Asks(Needs(previews=True)), rollout=_EndsOnly())


def test_a_stage_without_rewards_is_refused_unless_its_algorithm_reads_none():
    assert misfit(rewards=()).startswith("stages.main.rewards: a stage needs a reward.")
    setup = recipe.read("quickstart")
    stage = dataclasses.replace(setup.stages[0], rewards=(), algorithm=_Asks(Needs(rewards=False)))
    recipe.check(dataclasses.replace(setup, stages=(stage,)))


def test_a_gradient_through_the_reward_needs_rewards_that_have_one():
    message = misfit(algorithm=_Asks(Needs(differentiable=True)))
    assert message.startswith("stages.main.rewards.composition: passes no gradient")


def test_a_reward_of_weight_0_is_only_watched_and_needs_no_gradient():
    setup = recipe.read("quickstart")
    judge = setup.stages[0].rewards[0]
    smooth = dataclasses.replace(judge, name="smooth", reward=_Smooth())
    stage = dataclasses.replace(setup.stages[0], algorithm=_Asks(Needs(differentiable=True)))
    watched = dataclasses.replace(stage, rewards=(dataclasses.replace(judge, weight=0.0), smooth))
    recipe.check(dataclasses.replace(setup, stages=(watched,)))
    message = misfit(algorithm=stage.algorithm, rewards=(dataclasses.replace(judge, weight=-0.1), smooth))
    assert message.startswith("stages.main.rewards.composition: passes no gradient")


def test_pairs_need_a_rollout_that_hands_them_out_and_an_algorithm_that_reads_them():
    assert misfit(rollout=Dataset()).startswith("stages.main.rollout: the algorithm needs path")
    assert misfit(algorithm=_Asks(Needs()), rollout=Dataset()).startswith("stages.main.rollout: reads 'pair'")
    assert "preference" in misfit(algorithm=_Asks(Needs(preference=True)))
    message = misfit(data=PairFile(path="pairs.jsonl", per_step=4), algorithm=_Asks(Needs()))
    assert message.startswith("stages.main.rollout: samples by itself, and would not look at the pairs")


def test_rewards_may_read_only_what_the_data_gives():
    setup = recipe.read("quickstart")
    reward = dataclasses.replace(setup.stages[0].rewards[0], name="edit", reward=_Reads())
    message = misfit(rewards=(reward,))
    assert message.startswith("stages.main.rewards.edit: reads 'source image'")
    assert "prompt" in message


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("world_agent_grpo", "stages.rl.rollout.tools.serach", "{folder: world}"),
        ("world_agent_grpo", "stages.cold_start.rollout.agent.tools.serach", "{folder: world}"),
        ("world_agent_grpo", "stages.rl.rollout.renderer.backbone", "{name: tinny}"),
        ("world_unified", "stages.understanding.rollout.writer", "{name: vlm}"),
    ],
)
def test_what_an_entry_builds_itself_is_named_as_the_recipe_has_it(name, key, value):
    """The entry does not know which stage it stands in."""
    assert refusal(name, f"++{key}={value}").startswith(f"command line: {key}: no ")


def test_what_a_stage_takes_over_must_be_there():
    setup = recipe.read("quickstart")
    first = dataclasses.replace(setup.stages[0], learner=dataclasses.replace(setup.stages[0].learner, ema=None))
    plain_evaluation = dataclasses.replace(first.evaluate, weights="current")
    first = dataclasses.replace(first, evaluate=plain_evaluation)
    second = dataclasses.replace(first, name="next", carry=Carry(weights="ema"))
    plain = {**setup.recipe, "stages": {"main": setup.recipe["stages"]["main"], "next": setup.recipe["stages"]["main"]}}
    with pytest.raises(RecipeError, match="keeps no average") as refused:
        recipe.check(dataclasses.replace(setup, stages=(first, second), recipe=plain))
    assert "stages.main.learner.ema" in str(refused.value)


def test_a_reward_may_be_used_twice_and_only_for_evaluation():
    words = [
        "stages.main.rewards.composition={score: graded, shift: 0.5, scale: 2, clip: [-1, 1], batch: 8, workers: 2}",
        "stages.main.rewards.truth={reward: composition, score: strict, when: evaluation, retries: 1}",
    ]
    setup = recipe.read("quickstart", words)
    graded, truth = setup.stages[0].rewards
    assert (graded.reward.score, graded.weight, graded.shift, graded.scale) == ("graded", 1.0, 0.5, 2.0)
    assert graded.clip == (-1, 1)
    assert (graded.asking.batch, graded.asking.workers, graded.when) == (8, 2, "always")
    assert (truth.name, truth.reward.score, truth.weight, truth.when) == ("truth", "strict", 0.0, "evaluation")
    assert (graded.entry, truth.entry) == ("", "composition")
    plain = setup.recipe["stages"]["main"]["rewards"]
    told = {
        "weight": 0.0,
        "reward": "composition",
        "when": "evaluation",
        "retries": 1,
        "score": "strict",
        "by": "prompt",
    }
    assert plain["truth"] == told
    assert recipe.resolve(setup.recipe) == setup


def test_a_gate_may_name_a_component_that_nobody_declared():
    class Plain(_Smooth):
        components = None

    setup = recipe.read("quickstart", ["stages.main.total.gates=[{when: 'composition/graded < 0.5', at_most: 0}]"])
    judge = setup.stages[0].rewards[0]
    stage = dataclasses.replace(setup.stages[0], rewards=(dataclasses.replace(judge, name="own", reward=Plain()),))
    with pytest.raises(RecipeError, match="no reward or component named 'composition/graded'"):
        recipe.check(dataclasses.replace(setup, stages=(stage,)))
    gated = dataclasses.replace(stage, total=Total(gates=(Gate("own/anything < 0.5", 0.0),)))
    recipe.check(dataclasses.replace(setup, stages=(gated,)))


def test_evaluating_an_average_needs_one():
    with pytest.raises(RecipeError, match=r"stages\.main\.evaluate\.weights: there is no average .*learner\.ema"):
        recipe.read("quickstart", ["stages.main.learner.ema=null"])


def test_an_anchor_needs_an_average():
    changes = ["stages.main.learner.ema=null", "stages.main.evaluate.weights=current", "stages.main.anchor=ema"]
    with pytest.raises(RecipeError, match=r"stages\.main\.anchor: there is no average .*stages\.main\.learner\.ema"):
        recipe.read("quickstart", changes)


def test_rows_are_counted_where_the_path_is_recorded():
    setup = recipe.read("quickstart")
    stage = setup.stages[0]
    assert recipe.rows_per_step(stage) == 12 * 16 * 2
    whole = dataclasses.replace(stage, algorithm=_Asks(Needs(path=True)))
    assert recipe.rows_per_step(whole) == 12 * 16 * 9  # all steps but the last
    assert recipe.rows_per_step(dataclasses.replace(stage, algorithm=_Asks(Needs(rows=3)))) == 12 * 16 * 3
    assert recipe.rows_per_step(dataclasses.replace(stage, algorithm=_Asks(Needs(pairs=3)))) == 12 * 3
    assert recipe.rows_per_step(dataclasses.replace(stage, algorithm=_Asks(Needs()))) is None


def test_errors_keep_their_class():
    with pytest.raises(PluginError):
        recipe.read("quickstart", ["policy.backbone.name=tinny"])


# -------------------------------------------------------------------------------------- what a policy runs with


def test_a_policy_says_how_it_uses_its_machine():
    words = ["policy.encoders=offload", "policy.sets=cpu", "policy.attention=native", "policy.compile=aot_eager"]
    setup = recipe.read("quickstart", [*words, "policy.conditions=kept", "policy.conditions_in_memory=9"])
    assert dataclasses.asdict(setup.policy.resources) == {
        "encoders": "offload",
        "conditions_in_memory": 9,
        "sets": "cpu",
        "attention": "native",
        "compile": "aot_eager",
    }
    assert recipe.resolve(setup.recipe) == setup
    assert recipe.read("quickstart").recipe["policy"]["encoders"] == "keep", "defaults are written down"
    assert recipe.read("quickstart", ["policy.compile=true"]).policy.resources.compile is True


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("policy.encoders=of", r"policy.encoders: must be one of 'keep', 'offload', 'free', not 'of'"),
        ("policy.sets=gpu", r"policy.sets: must be one of 'device', 'cpu', not 'gpu'"),
        ("policy.conditions_in_memory=0", r"policy: .*conditions_in_memory must be 1 or more, not 0"),
        ("policy.conditions_in_memory=5", r"conditions_in_memory: needs a shelf. Set policy.conditions to a folder"),
        ("policy.compile=3", r"policy.compile: must be"),
        ("policy.encoder=free", r"policy.encoder: .*'encoders'"),
        ("policy.encoders=free", r"policy.encoders: the world's prompts \(stage 'main'\) have no end.* Use `offload`"),
    ],
)
def test_what_it_may_not_say(word, text):
    found = refusal("quickstart", word)
    assert re.search(text, found), found


# ---- policies that write ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("world_captioner", ["stages.main.rewards.brightness=1.0"], "judges a picture, and a token policy writes"),
        ("world_captioner", ["stages.main.algorithm.name=flow_grpo"], "is for tokens, but the algorithm"),
        ("world_captioner", ["stages.main.data.task=t2i"], "reads 'source', which the data does not give"),
        ("world_captioner", ["stages.main.rollout.temperature=0.0"], "temperature must be above 0"),
        ("quickstart", ["stages.main.rewards.caption_truth=1.0"], "reads 'text', which the data does not give"),
        ("quickstart", ["stages.main.rollout.name=vllm"], "is for tokens, but the algorithm"),
        ("quickstart", ["policy.backbone.name=tiny_captioner"], "is for tokens, but the algorithm"),
    ],
)
def test_words_and_pictures_are_not_mixed_up(name, words, message):
    assert message in refusal(name, *words)


@pytest.mark.parametrize("rollout", ["local", "vllm"])
def test_where_words_are_sampled_is_one_option(rollout):
    words = [f"stages.main.rollout.name={rollout}", "stages.main.rollout.most=12"]
    setup = recipe.read("world_captioner", words)
    assert setup.stages[0].rollout.most == 12
