"""TRL's reward functions as rewards, and rewards as TRL's reward functions.

TRL itself is not needed: `trainer` calls a function as GRPOTrainer of TRL 1.16 does, with everything it has.
"""

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rlkit.errors import PluginError
from rlkit.rewards.brightness import Brightness
from rlkit.rewards.composition import Composition
from rlkit.rewards.trl import Trl, as_trl
from rlkit.types import Prompt, Samples, Unscored

SamplesOf = Callable[..., Samples]
CPU = torch.device("cpu")

FUNCTIONS = """
import asyncio, threading

def red(prompts, completions, **kwargs):
    return [picture.getpixel((0, 0))[0] / 255 for picture in completions]

def seen(prompts, completions, goal, scale=1.0, bonus=None, log_metric=None, **kwargs):
    log_metric("calls", 1.0)
    seen.calls.append(dict(kwargs, prompts=prompts, completions=completions, goal=goal, bonus=bonus))
    return [scale * len(one) for one in goal]
seen.calls = []

def narrow(completions, goal):
    return [float(len(one)) for one in goal]

def sometimes(prompts, completions, **kwargs):
    return [None if "skip" in prompt else float("nan") if "nan" in prompt else 1 for prompt in prompts]

async def slow(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    slow.loops.append((asyncio.get_running_loop(), threading.current_thread()))
    return [len(prompt) for prompt in prompts]
slow.loops = []

class Judge:
    async def __call__(self, prompts, completions, **kwargs):
        return [2.0 for _ in completions]
judge = Judge()

def short(prompts, completions, **kwargs):
    return [1.0]

def tokens(completions, completion_ids):
    return [0.0 for _ in completions]

def optional_tokens(completions, completion_ids=None, trainer_state=None):
    assert completion_ids is None and trainer_state is None
    return [0.5 for _ in completions]

constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that lies in the working directory, and nowhere else."""
    name = f"functions_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture
def load(module: str) -> Iterator[Callable[..., Any]]:
    """load(name of a function, **options) -> what is called with samples; closed at the end."""
    loaded: list[Any] = []

    def make(function: str, **options: Any) -> Any:
        loaded.append(Trl(function=f"{module}:{function}", options=options).load(CPU))
        return loaded[-1]

    yield make
    for one in loaded:
        one.close()


def reds(*levels: float) -> Tensor:
    media = torch.zeros(len(levels), 3, 2, 3)
    media[:, 0] = torch.tensor(levels).view(-1, 1, 1)
    return media


# ------------------------------------------------------------------------------------------- as a reward here


def test_completions_are_pictures(load: Callable[..., Any], samples_of: SamplesOf) -> None:
    values = load("red")(samples_of(reds(0.0, 0.2, 1.0), ["a", "b", "c"]))
    assert values == pytest.approx([0.0, 0.2, 1.0])


def test_metadata_are_columns_and_options_are_keywords(load: Callable[..., Any], samples_of: SamplesOf) -> None:
    scorer = load("seen", scale=2.0)
    metadata = [{"goal": "ab", "level": 1}, {"goal": "abc", "prompts": "not mine"}]
    assert scorer(samples_of(reds(0, 1), ["one", "two"], metadata=metadata)) == [4.0, 6.0]
    (call,) = scorer.function.calls
    assert call["prompts"] == ["one", "two"], "metadata cannot take the place of the prompts"
    assert call["goal"] == ["ab", "abc"]
    assert call["level"] == [1, None]
    assert call["bonus"] is None, "its own default: no sample has this column"
    assert [picture.size for picture in call["completions"]] == [(3, 2), (3, 2)]
    assert all(isinstance(picture, Image.Image) for picture in call["completions"])


def test_only_columns_that_it_names_are_given(load: Callable[..., Any], samples_of: SamplesOf) -> None:
    metadata = [{"goal": "ab", "other": 1}]
    assert load("narrow")(samples_of(reds(0), ["one"], metadata=metadata)) == [2.0]
    assert load("optional_tokens")(samples_of(reds(0), ["one"], metadata=metadata)) == [0.5]


def test_a_sample_without_a_column_is_not_scored_and_the_others_are(
    load: Callable[..., Any], samples_of: SamplesOf
) -> None:
    metadata = [{"goal": "ab"}, {}, {"goal": "abcd"}]
    values = load("narrow")(samples_of(reds(0, 0, 0), ["a", "b", "c"], metadata=metadata))
    assert values[::2] == [2.0, 4.0]
    assert isinstance(values[1], Unscored)
    assert "needs goal: add it to the metadata" in values[1].reason
    (lonely,) = load("narrow")(samples_of(reds(0), ["a"]))
    assert isinstance(lonely, Unscored)


def test_none_is_not_scored(load: Callable[..., Any], samples_of: SamplesOf) -> None:
    values = load("sometimes")(samples_of(reds(0, 0, 0), ["a", "skip", "nan"]))
    assert values[0] == 1.0
    for value in values[1:]:
        assert isinstance(value, Unscored)
        assert value.reason.endswith(":sometimes returned None")


def test_asynchronous_functions_keep_one_loop(load: Callable[..., Any], samples_of: SamplesOf) -> None:
    scorer, samples = load("slow"), samples_of(reds(0, 0), ["a", "abc"])
    assert scorer(samples) == [1, 3]

    async def within_a_notebook() -> Any:
        return scorer(samples)  # asyncio.run inside a reward would raise here

    assert asyncio.run(within_a_notebook()) == [1, 3]
    (first, thread), (second, _) = scorer.function.loops
    assert first is second, "a session that the function keeps belongs to its loop"
    assert thread is not threading.current_thread()
    assert load("judge")(samples) == [2.0, 2.0]
    scorer.close()
    assert not thread.is_alive()
    scorer.close()


def test_a_picture_that_is_none_costs_itself_alone(load: Callable[..., Any], samples_of: SamplesOf) -> None:
    values = load("red")(samples_of(reds(0.2, torch.nan, 1.0), ["a", "b", "c"]))
    assert values[::2] == pytest.approx([0.2, 1.0])
    assert isinstance(values[1], Unscored)
    assert "NaN" in values[1].reason
    assert load("short")(samples_of(reds(), [])) == [], "not called for nothing: it would return 1 number"


def test_a_wrong_number_of_numbers_is_an_error(load: Callable[..., Any], samples_of: SamplesOf) -> None:
    with pytest.raises(ValueError, match=r":short returned 1 numbers for 2 pictures"):
        load("short")(samples_of(reds(0, 0), ["a", "b"]))


def test_functions_that_cannot_be_called_are_refused_when_loaded(module: str) -> None:
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("tokens", {}, ValueError, "asks for completion_ids, which pictures have not"),
        ("narrow", {"scale": 2}, ValueError, "takes no scale: it takes completions, goal"),
        ("constant", {}, ValueError, "is 3, which cannot be called"),
        ("reds", {}, PluginError, "has no 'reds'. Did you mean 'red'?"),
    ]
    for function, options, error, message in cases:
        with pytest.raises(error) as raised:
            Trl(function=f"{module}:{function}", options=options).load(CPU)
        assert message in str(raised.value)
    with pytest.raises(PluginError, match="there is no module"):
        Trl(function="no_such_module_here:f").load(CPU)


@pytest.mark.parametrize("function", ["", "module", "module:", ":function", "a b:c", "module:f()"])
def test_a_function_is_written_module_colon_name(function: str) -> None:
    with pytest.raises(ValueError, match=r"must be package.module:function"):
        Trl(function=function)


def test_options_cannot_take_the_place_of_the_call() -> None:
    with pytest.raises(ValueError, match="options cannot hold completions, trainer_state"):
        Trl(function="a:b", options={"trainer_state": None, "completions": [], "scale": 1})


# ------------------------------------------------------------------------------------------- the way back


def trainer(function: Callable[..., Any], rows: Sequence[dict[str, Any]], completions: Sequence[Any]) -> list[float]:
    """Calls a function, and reads its answer, as GRPOTrainer._calculate_rewards does. `rows`: the data set's."""
    assert not inspect.iscoroutinefunction(function)
    assert isinstance(function.__name__, str), "the name it is logged under"
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    prompts = [row["prompt"] for row in rows]
    extras = {"trainer_state": object(), "log_extra": print, "log_metric": print, "environments": None}
    answer = function(prompts=prompts, completions=completions, completion_ids=[[1]] * len(rows), **columns, **extras)
    answer = [torch.nan if value is None else value for value in answer]
    assert len(answer) == len(prompts)
    return torch.tensor(answer, dtype=torch.float32).tolist()


def flat(level: int, size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


@dataclass(frozen=True)
class Recorder:
    """A reward that keeps what it is called with, and answers 0, 1, 2, ..."""

    calls: tuple[list[Samples], ...] = ([],)
    higher_is_better = True

    def __call__(self, samples: Samples) -> tuple[list[Any], dict[str, Any]]:
        self.calls[0].append(samples)
        return [float(row) for row in range(len(samples))], {"part": torch.zeros(len(samples))}


def test_a_reward_as_a_function_of_trl() -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    function = as_trl(Brightness())
    assert function.__name__ == "Brightness"
    values = trainer(function, rows, [flat(0), flat(51), flat(255)])
    assert values == pytest.approx([0, 0.2, 1])
    messages = [
        {"role": "assistant", "content": [{"type": "text", "text": "Here."}, {"type": "image", "image": flat(51)}]}
    ]
    values = trainer(function, rows, [messages, torch.ones(3, 2, 2), flat(51).convert("L")])
    assert values == pytest.approx([0.2, 1, 0.2])


def test_pictures_of_several_sizes_and_text_among_them() -> None:
    completions = [flat(0), flat(51, (6, 2)), "only words", flat(255), [{"role": "assistant", "content": "words"}]]
    values = trainer(as_trl(Brightness()), [{"prompt": "a"}] * 5, completions)
    assert values[:2] == pytest.approx([0, 0.2])
    assert values[3] == pytest.approx(1)
    assert torch.tensor(values)[[2, 4]].isnan().all()


def test_columns_become_the_prompt() -> None:
    reward = Recorder(([],))
    rows = [
        {"prompt": "x", "target_text": "OPEN", "source": flat(51), "references": [flat(0), flat(255)], "level": 1},
        {"prompt": "y", "target_text": ["A", "B"], "source": None, "references": None, "level": 2},
        {
            "prompt": [
                {"role": "system", "content": "Draw."},
                {"role": "user", "content": [{"type": "text", "text": "x"}]},
            ]
        }
        | {"target_text": None, "source": None, "references": [], "level": 3},
    ]
    assert trainer(as_trl(reward), rows, [flat(0)] * 3) == [0, 1, 2]
    ((samples,),) = reward.calls
    assert [prompt.text for prompt in samples.prompts] == ["x", "y", "x"]
    assert [dict(prompt.metadata) for prompt in samples.prompts] == [{"level": 1}, {"level": 2}, {"level": 3}]
    assert [prompt.target_text for prompt in samples.prompts] == [("OPEN",), ("A", "B"), ()]
    assert samples.prompts[0].source is not None
    assert samples.prompts[0].source.unique().item() == pytest.approx(0.2)
    assert [one.mean().item() for one in samples.prompts[0].references] == [0, 1]
    assert samples.prompts[1].source is None
    assert samples.group.tolist() == [0, 1, 0], "equal prompts are one group"
    assert (samples.total, len(samples)) == (3, 3)


def test_what_is_not_scored_is_none_and_more_is_better() -> None:
    def reward(samples: Samples) -> list[Any]:
        return [Unscored("why"), None, float("nan"), float("inf"), 2.0]

    values = as_trl(reward)(["a"] * 5, [flat(0)] * 5)
    assert values == [None, None, None, None, 2.0]

    @dataclass(frozen=True)
    class Worse(Recorder):
        higher_is_better = False

    assert as_trl(Worse(([],)))(["a"] * 3, [flat(0)] * 3) == [0, -1, -2]
    captions = ["a red circle", "a photo of a dog"]
    values = as_trl(Composition())(captions, [flat(0, (32, 32))] * 2)
    assert values[0] is not None
    assert values[1] is None


def test_there_and_back_again(module: str) -> None:
    function = as_trl(Trl(function=f"{module}:red"))
    assert trainer(function, [{"prompt": "a"}] * 2, [flat(0), flat(255)]) == [0, 1]
    assert as_trl(functools.partial(Recorder(([],))))(["a"], [flat(0)]) == [0.0]
    assert function([], []) == []


def test_a_prompt_of_here_has_an_identity_per_group() -> None:
    reward = Recorder(([],))
    as_trl(reward)(["x", "y", "x"], [flat(0)] * 3)
    assert [prompt.id for prompt in reward.calls[0][0].prompts] == [0, 1, 0]
    assert isinstance(reward.calls[0][0].prompts[0], Prompt)
