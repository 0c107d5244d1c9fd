"""A reward at work: batches, threads, processes, time limits, second tries, cached scores, and what is no number."""

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlkit import score_cache
from rlkit.errors import PluginError
from rlkit.scorer import HUNG, Asking, Scorer, why
from rlkit.types import Prompt, Samples, Unscored

CPU = torch.device("cpu")
MakeSamples = Callable[..., Samples]


@dataclass
class Brightness:
    """Notes how many samples each call had."""

    factor: float = 1.0
    calls: list[int] = field(default_factory=list, compare=False)

    groupwise = False
    reads = ("prompt",)

    def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls.append(len(samples))
        values = samples.media.mean((1, 2, 3)) * self.factor
        return values, {"half": values / 2}


@pytest.fixture
def six(samples_of: MakeSamples) -> Samples:
    """Three groups of two, each picture with a brightness of its own."""
    samples = samples_of(["one", "one", "two", "two", "three", "three"], group=2)
    levels = torch.linspace(0, 1, 6).reshape(6, 1, 1, 1)
    return replace(samples, media=torch.zeros(6, 3, 4, 4) + levels)


def ask(reward: Any, samples: Samples, **options: Any) -> Any:
    scorer = Scorer("bright", reward, Asking(**options), CPU)
    scorer.sleep = lambda seconds: None
    try:
        return scorer(samples)
    finally:
        scorer.close()


@pytest.mark.parametrize(("batch", "calls"), [(None, [6]), (6, [6]), (4, [4, 2]), (1, [1] * 6)])
def test_any_batch_gives_the_same_numbers(six: Samples, batch: int | None, calls: list[int]) -> None:
    reward = Brightness()
    answer = ask(reward, six, batch=batch)
    assert reward.calls == calls
    torch.testing.assert_close(answer.values, torch.linspace(0, 1, 6))
    torch.testing.assert_close(answer.components["half"], torch.linspace(0, 0.5, 6))
    assert not answer.reasons


@pytest.mark.parametrize(("batch", "calls"), [(1, [2, 2, 2]), (3, [2, 2, 2]), (4, [4, 2]), (None, [6])])
def test_a_reward_that_compares_is_given_whole_groups(six: Samples, batch: int | None, calls: list[int]) -> None:
    class Rank(Brightness):
        groupwise = True

    reward = Rank()
    ask(reward, six, batch=batch)
    assert reward.calls == calls


def test_a_reward_that_does_not_say_is_given_whole_groups_too(six: Samples) -> None:
    seen = []

    def plain(samples: Samples) -> Tensor:
        seen.append(samples.group.tolist())
        return samples.index.float()

    assert ask(plain, six, batch=1).values.tolist() == [0, 1, 2, 3, 4, 5]
    assert seen == [[0, 0], [1, 1], [2, 2]]


def test_several_calls_run_at_once_and_keep_their_places(six: Samples) -> None:
    both = threading.Barrier(3, timeout=20)  # a call waits until all three are under way

    class Together(Brightness):
        def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
            both.wait()
            return super().__call__(samples)

    answer = ask(Together(), six, batch=2, workers=3)
    torch.testing.assert_close(answer.values, torch.linspace(0, 1, 6))


def test_a_missing_package_is_named_whatever_the_recipe_calls_the_reward(six: Samples) -> None:
    class Lacking:
        def load(self, device: torch.device) -> Any:
            raise ModuleNotFoundError("No module named 'rapidocr'", name="rapidocr")

    with pytest.raises(PluginError, match=r"rewards\.legible: reward 'ocr' needs 'rapidocr'.*rlkit-visual\[ocr\]"):
        Scorer("legible", Lacking(), Asking(), CPU, entry="ocr")(six)


def test_no_samples_are_no_calls(six: Samples) -> None:
    reward = Brightness()
    assert ask(reward, six.select(torch.tensor([], dtype=torch.int64))).values.shape == (0,)
    assert not reward.calls


# ---- what is no number -----------------------------------------------------------------------------------------------


def test_unscored_says_why_and_is_no_zero(six: Samples) -> None:
    said: Sequence[Any] = [0.5, Unscored("cut off"), None, Unscored("cut off"), math.nan, 0.25]
    answer = ask(lambda samples: said, six)
    assert answer.values.isnan().tolist() == [False, True, True, True, True, False]
    assert answer.reasons == Counter({"cut off": 2, "it returned NaN, infinity or None": 2})
    assert why(answer.reasons) == "cut off (2); it returned NaN, infinity or None (2)"
    assert why(Counter({"cut off": 2})) == "cut off"
    assert why(Counter({"a": 4, "b": 3, "c": 2, "d": 1})) == "a (4); b (3); c (2); and 1 others"


def test_a_number_beyond_the_declared_range_is_none(six: Samples) -> None:
    """EditScore's package turns a score of 26 out of 25 into a reward of 1.118."""

    class Bounded(Brightness):
        range = (0.0, 1.0)

    answer = ask(Bounded(factor=1.118), six)
    assert answer.values.isnan().tolist() == [False] * 5 + [True]
    assert list(answer.reasons) == ["outside its range 0..1, for instance 1.118"]
    assert not ask(Bounded(factor=1.00001), six).reasons, "rounding is no offence"
    assert not ask(Brightness(factor=1.118), six).reasons, "one without a range may say anything"


def test_what_was_loaded_may_know_the_range(six: Samples) -> None:
    class Elsewhere:
        groupwise = False

        def load(self, device: torch.device) -> Any:
            loaded = Brightness()
            loaded.range = (0.0, 0.5)  # type: ignore[attr-defined]
            return loaded

    assert ask(Elsewhere(), six).values.isnan().sum() == 3


def test_components_that_are_no_mapping_are_an_error(six: Samples) -> None:
    answer = ask(lambda samples: (torch.zeros(6), torch.zeros(6)), six)
    assert "TypeError: a reward returns numbers, or (numbers, components by name), not Tensor" in answer.reasons


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_bad_sample_costs_itself_alone_and_in_a_comparison_its_group(six: Samples) -> None:
    class Picky(Brightness):
        def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
            if bool((samples.index == 3).any()):
                raise OSError("cannot read it")
            return super().__call__(samples)

    class Comparing(Picky):
        groupwise = True

    alone, comparing = ask(Picky(), six), ask(Comparing(), six)
    assert alone.values.isnan().tolist() == [False, False, False, True, False, False]
    assert comparing.values.isnan().tolist() == [False, False, True, True, False, False]
    assert alone.reasons == Counter({"OSError: cannot read it": 1})
    assert alone.components["half"].isnan().tolist() == [False, False, False, True, False, False]


class Flaky(Brightness):
    """Fails so many times."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("busy")
        return super().__call__(samples)


def test_a_failing_call_is_tried_again_after_a_growing_pause(six: Samples) -> None:
    scorer, pauses = Scorer("flaky", Flaky(3), Asking(retries=3), CPU), []
    scorer.sleep = pauses.append
    assert not scorer(six).reasons
    assert [0.5 <= pause / 2**i <= 1 for i, pause in enumerate(pauses)] == [True] * 3
    assert len(ask(Flaky(4), six, retries=3).reasons) == 0, "then it is asked in parts, and the first part is tried"
    one = six.select(torch.tensor([0]))
    assert ask(Flaky(3), one, retries=2).reasons == Counter({"ConnectionError: busy": 1})


class Hanging(Brightness):
    """Waits for ever where a picture is dark."""

    def __init__(self, until: float) -> None:
        super().__init__()
        self.until, self.asked, self.never = until, 0, threading.Event()

    def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        self.asked += 1
        if bool((samples.media.mean((1, 2, 3)) < self.until).any()):
            self.never.wait()
        return super().__call__(samples)


def test_a_call_that_hangs_is_left_behind_and_the_others_count(six: Samples) -> None:
    answer = ask(Hanging(0.1), six, batch=1, timeout=0.05)
    assert answer.values.isnan().tolist() == [True] + [False] * 5
    assert answer.reasons == Counter({"TimeoutError: no answer within 0.05 s": 1})


def test_a_reward_that_hangs_is_not_waited_for_all_day(six: Samples) -> None:
    reward = Hanging(2.0)
    answer = ask(reward, six, batch=1, timeout=0.05)
    assert reward.asked == HUNG
    assert answer.reasons["not asked: TimeoutError: no answer within 0.05 s"] == 6 - HUNG
    assert answer.values.isnan().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch must be 1 or more"),
        ({"workers": 0}, "workers must be 1 or more"),
        ({"retries": -1}, "retries must be 0 or more"),
        ({"timeout": 0.0}, "timeout must be above 0"),
        ({"timeout": math.nan}, "timeout must be above 0"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Asking(**options)


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distant:
    """Says in which process it is; ends it where a picture is dark."""

    groupwise = False

    def __call__(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        if bool((samples.media.mean((1, 2, 3)) < 0.1).any()):
            os._exit(9)
        return samples.media.mean((1, 2, 3)), {"process": torch.full((len(samples),), float(os.getpid()))}


def test_a_process_of_its_own_may_die_and_is_replaced(six: Samples) -> None:
    answer = ask(Distant(), six, processes=True, timeout=60.0)
    assert answer.values.isnan().tolist() == [True] + [False] * 5
    torch.testing.assert_close(answer.values[1:], torch.linspace(0, 1, 6)[1:])
    assert answer.reasons == Counter({"RuntimeError: its process ended (exit code 9)": 1})
    assert os.getpid() not in answer.components["process"].tolist()


# ---- cached scores ---------------------------------------------------------------------------------------------------


def test_a_score_is_not_asked_for_twice(six: Samples, tmp_path: Path) -> None:
    file, reward = str(tmp_path / "new" / "scores.sqlite"), Brightness()
    first = ask(reward, six.select(torch.tensor([1, 3])), cache=file)
    second = ask(reward, six, cache=file)
    assert reward.calls == [2, 4], "the other four alone"
    assert torch.equal(second.values[[1, 3]], first.values)
    torch.testing.assert_close(second.values, torch.linspace(0, 1, 6))
    torch.testing.assert_close(second.components["half"], torch.linspace(0, 0.5, 6))


def test_only_numbers_are_kept(six: Samples, tmp_path: Path) -> None:
    file = str(tmp_path / "scores.sqlite")

    class Fussy(Brightness):
        def __call__(self, samples: Samples) -> Any:
            self.calls.append(len(samples))
            return [Unscored("busy")] * len(samples)

    assert ask(Fussy(), six, cache=file).values.isnan().all()
    reward = Fussy()
    ask(reward, six, cache=file)
    assert reward.calls == [6], "a failure is asked again"


CHANGES: dict[str, Callable[[Samples], Samples]] = {
    "a pixel": lambda one: replace(one, media=one.media + 1 / 255),
    "the shape of equal bytes": lambda one: replace(one, media=one.media.reshape(1, 3, 2, 8)),
    "the prompt": lambda one: replace(one, prompts=(Prompt(0, "other"),)),
    "the text in the picture": lambda one: replace(one, prompts=(replace(one.prompts[0], target_text=("A",)),)),
    "the source": lambda one: replace(one, prompts=(replace(one.prompts[0], source=torch.ones(3, 2, 2)),)),
    "a reference": lambda one: replace(one, prompts=(replace(one.prompts[0], references=(torch.ones(3, 2, 2),)),)),
    "the answer": lambda one: replace(one, texts=("a red circle",)),
    "the metadata": lambda one: replace(one, prompts=(replace(one.prompts[0], metadata={"a": 1}),)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_holds_all_that_a_score_depends_on(six: Samples, change: str) -> None:
    def anything(samples: Samples) -> Tensor:  # says not what it reads
        return samples.index.float()

    one = six.select(torch.tensor([2]))
    assert score_cache.keys(anything, one) == score_cache.keys(anything, replace(one, index=one.index + 7))
    assert score_cache.keys(anything, one) != score_cache.keys(anything, CHANGES[change](one))


def test_the_key_holds_the_options_and_the_version_and_not_what_is_not_read(six: Samples) -> None:
    class Newer(Brightness):
        version = "2"

    one = six.select(torch.tensor([2]))
    found = [score_cache.keys(reward, one)[0] for reward in (Brightness(), Brightness(2.0), Newer())]
    assert len(set(found)) == 3
    assert score_cache.keys(Brightness(), CHANGES["the metadata"](one))[0] == found[0]


def test_the_key_holds_the_state_of_a_file_that_an_option_names(six: Samples, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Judge:
        template: str

    file = tmp_path / "prompt.txt"
    file.write_text("how good is it?")
    before = score_cache.keys(Judge(str(file)), six)
    assert score_cache.keys(Judge(str(file)), six) == before
    file.write_text("how bad is it, then?")
    assert score_cache.keys(Judge(str(file)), six) != before


# ---- while the rest is still being sampled ---------------------------------------------------------------------------


def parts_of(six: Samples) -> list[Samples]:
    return [six.select(torch.tensor(rows)) for rows in ([4, 5], [0, 1])]


def test_what_is_begun_ahead_gives_the_same_numbers(six: Samples) -> None:
    reward = Brightness()
    scorer = Scorer("bright", reward, Asking(ahead=True), CPU)
    for part in parts_of(six):
        scorer.begin(part)
    answer = scorer(six)
    torch.testing.assert_close(answer.values, torch.linspace(0, 1, 6))
    torch.testing.assert_close(answer.components["half"], torch.linspace(0, 0.5, 6))
    assert reward.calls == [2, 2, 2], "two that were begun, and the one that was not"
    scorer(six)
    assert reward.calls[3:] == [6], "the next step begins with nothing"
    scorer.close()


def test_failures_ahead_are_counted_like_others(six: Samples) -> None:
    scorer = Scorer("flaky", Flaky(99), Asking(ahead=True), CPU)
    for part in parts_of(six):
        scorer.begin(part)
    assert scorer(six).reasons == Counter({"ConnectionError: busy": 6})
    scorer.close()


def test_a_reward_that_compares_waits_for_all(six: Samples) -> None:
    class Rank(Brightness):
        groupwise = True

    for reward, ahead in ((Rank(), True), (Brightness(), False)):
        scorer = Scorer("rank", reward, Asking(ahead=ahead), CPU)
        scorer.begin(six.select(torch.tensor([0, 1])))
        assert not scorer.begun
        scorer(six)
        assert reward.calls == [6]


def test_what_was_loaded_may_tell_cached_scores_apart(six: Samples, tmp_path: Path) -> None:
    """The server behind an address may be started again with other options."""

    class Served:
        groupwise, reads = False, ()

        def __init__(self, factor: float) -> None:
            self.factor = factor

        def load(self, device: torch.device) -> Any:
            loaded = Brightness(self.factor)
            loaded.fingerprint = str(self.factor)  # type: ignore[attr-defined]
            return loaded

    file = str(tmp_path / "scores.sqlite")
    for factor in (1.0, 0.5):
        torch.testing.assert_close(ask(Served(factor), six, cache=file).values, torch.linspace(0, 1, 6) * factor)
