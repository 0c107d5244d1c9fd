"""Monitors: each is set off by what it is for and silent on what is healthy; and what a run does after an alarm."""

import json
import math
import shutil
import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rlkit import checkpoint, recipe, registry, session
from rlkit.dist import Processes
from rlkit.errors import CheckpointError, RecipeError, RewardError
from rlkit.monitors.looks import Colour, Copy, Sharpness, TextArea
from rlkit.monitors.reading import Reading
from rlkit.monitors.sanity import Sanity, judged, refused
from rlkit.monitors.signs import Collapse, Diversity, Drift, HeldOut, Mismatch, Spread, distance, panel
from rlkit.monitors.watch import Monitors, Watch
from rlkit.report import summary as report
from rlkit.scoring import Scoring, WeightedReward
from rlkit.tracking import Metrics, Tracker
from rlkit.types import Prompt, Samples, Scores

NOISE = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Judge:
    """A reward in name only: nothing here is scored anew."""

    def __init__(self, higher_is_better=True):
        self.higher_is_better = higher_is_better


TRAINED = WeightedReward("trained", Judge(), 1.0)
WATCHED = WeightedReward("watched", Judge(), 0.0)


def reading(row, kind="evaluation", media=NOISE, group=4, rewards=(TRAINED,), components=None, sources=None):
    n = len(media)
    index = torch.arange(n)
    prompts = tuple(Prompt(i // group, "a red circle", source=sources[i] if sources else None) for i in range(n))
    samples = Samples(media, torch.zeros(n, 0), prompts, index // group, index, index, version=0, total=n)
    raw = torch.arange(float(n))[:, None].repeat(1, len(rewards))
    weights = torch.tensor([one.weight for one in rewards])
    names = tuple(one.name for one in rewards)
    scores = Scores(names, raw, torch.isfinite(raw), weights, {} if components is None else components)
    return Reading({"kind": kind, "at": 0, **row}, samples, scores, rewards, lambda values: values)


def look(monitor, readings):
    """The findings of a monitor over readings in order; its memory goes through json, as in a checkpoint."""
    memory, found = {}, []
    for one in readings:
        found.append(monitor.look(one, memory))
        memory = json.loads(json.dumps(memory, allow_nan=False))
    return found


def alarmed(monitor, readings):
    return [finding is not None and finding.alarm is not None for finding in look(monitor, readings)]


# ------------------------------------------------------------------------------------------------------ held_out


def evaluated(total, watched, error=0.01, rewards=(TRAINED, WATCHED)):
    row = {"held_out/reward": total, "held_out/watched": watched, "held_out/watched_se": error}
    return reading(row, rewards=rewards)


def test_what_is_not_trained_on_falls_while_the_reward_rises():
    seen = [evaluated(0.1, 0.50), evaluated(0.3, 0.40), evaluated(0.5, 0.30), evaluated(0.6, 0.30)]
    assert alarmed(HeldOut(), seen) == [False, False, True, True], "two evaluations in a row"
    assert alarmed(HeldOut(in_a_row=1), seen) == [False, True, True, True]
    finding = look(HeldOut(), seen)[2]
    assert finding.figures[""] == finding.alarm.value == pytest.approx(0.2 / math.hypot(0.01, 0.01))
    assert "from 0.100 to 0.500 while watched" in finding.alarm.text
    assert "from 0.500 at its best to 0.300" in finding.alarm.text


@pytest.mark.parametrize(
    "seen",
    {
        "both rise": [evaluated(0.1, 0.3), evaluated(0.3, 0.4), evaluated(0.5, 0.5)],
        "the total did not rise": [evaluated(0.5, 0.5), evaluated(0.4, 0.3), evaluated(0.3, 0.2)],
        "within the noise": [evaluated(0.1, 0.5, 0.1), evaluated(0.3, 0.4, 0.1), evaluated(0.5, 0.3, 0.1)],
        "not in a row": [evaluated(0.1, 0.5), evaluated(0.3, 0.4), evaluated(0.4, 0.5), evaluated(0.5, 0.4)],
        "not scored": [evaluated(0.1, math.nan), evaluated(math.nan, 0.4), evaluated(0.4, math.nan)],
        "nothing is watched": [evaluated(0.1, 0.5, rewards=(TRAINED,)), evaluated(0.9, 0.1, rewards=(TRAINED,))] * 2,
    }.values(),
    ids=["both rise", "no rise", "noise", "not in a row", "not scored", "no panel"],
)
def test_what_is_no_hack(seen):
    assert not any(alarmed(HeldOut(), seen))


def test_a_fall_is_measured_from_the_best_and_not_from_the_start():
    seen = [evaluated(0.1, 0.3), evaluated(0.2, 0.6), evaluated(0.3, 0.5), evaluated(0.4, 0.5)]
    assert alarmed(HeldOut(), seen) == [False, False, False, True]


def test_of_a_reward_whose_less_is_better_a_rise_is_the_fall():
    turned = (TRAINED, WeightedReward("watched", Judge(higher_is_better=False), 0.0))
    rising = [evaluated(t, w, rewards=turned) for t, w in ((0.1, 0.2), (0.2, 0.4), (0.3, 0.4))]
    assert alarmed(HeldOut(), rising)[-1]
    falling = [evaluated(t, w, rewards=turned) for t, w in ((0.1, 0.4), (0.2, 0.2), (0.3, 0.1))]
    assert not any(alarmed(HeldOut(), falling))


def test_the_panel_has_watched_rewards_and_components_that_go_with_theirs():
    up, down = torch.arange(8.0), -torch.arange(8.0)
    parts = {"trained/strict": up, "trained/sigma": down, "trained/flag": torch.ones(8), "trained/area": up}
    parts |= {"watched/part": up, "trained/holes": torch.where(up > 3, up, torch.nan)}
    assert panel(reading({}, rewards=(TRAINED, WATCHED), components=parts)) == {
        "held_out/watched": 1,
        "held_out/strict": 1,
        "held_out/part": 1,
        "held_out/holes": 1,
    }
    less = WeightedReward("trained", Judge(higher_is_better=False), 1.0)
    assert panel(reading({}, rewards=(less,), components={"trained/sigma": down})) == {"held_out/sigma": 1}


# ------------------------------------------------------------------------------------------------------ collapse


def totals(*values, error=0.01):
    return [reading({"held_out/reward": value, "held_out/reward_se": error}) for value in values]


def test_a_trained_reward_that_falls_far_below_its_best_is_a_collapse():
    """DiffusionNFT at a constant rate and without a KL rises, and then comes apart."""
    seen = totals(0.37, 0.45, 0.43, 0.30, 0.20, 0.44)
    assert alarmed(Collapse(), seen) == [False, False, False, False, True, False]
    finding = look(Collapse(), seen)[4]
    assert finding.figures[""] == finding.alarm.value == pytest.approx(0.25 / math.hypot(0.01, 0.01))
    assert "from 0.450 at its best to 0.200" in finding.alarm.text
    assert not any(alarmed(Collapse(), totals(0.37, 0.30, 0.20, 0.10, error=0.1))), "noise"
    assert not any(alarmed(Collapse(), totals(0.37, 0.30, math.nan, 0.38, 0.30, 0.40))), "not in a row"


# -------------------------------------------------------------------------------------- steps: spread, diversity, drift


def step(std=0.3, equal=0.1, media=NOISE, rewards=(TRAINED,), group=4, **row):
    row |= {"reward/group_std": std, "zero_std": equal}
    return reading(row, kind="train", media=media, rewards=rewards, group=group)


def test_the_spread_of_a_group_collapses():
    seen = [step(0.4), step(0.2), step(0.06), step(0.04)]
    assert alarmed(Spread(window=2), seen) == [False, False, False, True]
    assert look(Spread(window=2), seen)[-1].figures[""] == pytest.approx(0.05 / 0.3)
    assert not any(alarmed(Spread(window=2), [step(0.4), step(0.2), step(0.1), step(0.3)])), "0.2 in the mean is enough"
    assert not any(alarmed(Spread(window=2), [step(math.nan)] * 6)), "steps without scores"


def test_groups_of_equal_scores():
    seen = [step(equal=0.2)] * 2 + [step(equal=0.95), step(equal=0.95)]
    finding = look(Spread(window=2), seen)[-1]
    assert (finding.alarm.value, finding.alarm.threshold) == (pytest.approx(0.95), 0.9)
    assert not any(alarmed(Spread(window=1), [step(0.0, 1.0, group=1)] * 6)), "groups of one never had a spread"
    assert not any(alarmed(Spread(window=1), [step(), step(0.0, 1.0, rewards=(WATCHED,))] * 3)), "nothing is trained on"
    pair = step(0.0, 1.0)
    pair = replace(pair, samples=replace(pair.samples, preference=torch.tensor([True, False] * 4)))
    assert look(Spread(window=1), [step(), pair])[-1] is None, "pairs of a data set"


def test_the_distance_of_pictures_is_the_root_mean_square():
    media = torch.zeros(6, 3, 8, 8)
    media[1] += 0.3  # the first group: one pair of three is 0, two are 0.3 apart
    media[4], media[5] = 0.5, 1.0  # 0.5, 1.0 and 0.5
    assert distance(step(media=media, group=3)) == pytest.approx((0.2 + 2 / 3) / 2)
    assert math.isnan(distance(step(media=media, group=1)))
    large = torch.zeros(2, 3, 256, 128)
    large[1] = 0.25
    assert distance(step(media=large, group=2)) == pytest.approx(0.25)


def test_pictures_of_a_prompt_become_alike():
    alike = NOISE * 0.3 + 0.4
    assert alarmed(Diversity(window=1), [step(), step(media=alike)]) == [False, True]
    assert look(Diversity(window=1), [step(), step(media=alike)])[-1].figures[""] == pytest.approx(0.3)
    assert not any(alarmed(Diversity(window=1), [step(), step(media=NOISE * 0.5), step()]))
    assert not any(alarmed(Diversity(window=1), [step(group=1)] * 4))
    same = step(media=torch.zeros(8, 3, 16, 16))
    assert not any(alarmed(Diversity(window=1), [same] * 4)), "nothing to compare with"


@pytest.mark.parametrize(
    ("far", "text"),
    [
        ({"kl": 1.5}, "kl is 1.5 in the mean of the last 2 steps, above 1"),
        ({"ratio/mean": 0.8}, "|ratio/mean - 1| is 0.2"),
        ({"clip_fraction": 0.95}, "clip_fraction is 0.95"),
    ],
)
def test_the_policy_went_too_far(far, text):
    healthy = {"kl": 0.1, "ratio/mean": 1.001, "clip_fraction": 0.5}
    seen = [reading(healthy, "train"), reading(healthy | far, "train"), reading(healthy | far, "train")]
    finding = look(Drift(window=2), seen)[-1]
    assert finding.alarm is not None
    assert finding.figures[""] == pytest.approx(finding.alarm.value / finding.alarm.threshold)
    assert text in finding.alarm.text
    assert not any(alarmed(Drift(window=2), [reading(healthy, "train")] * 5))
    off = Drift(window=2, kl=None, ratio=None, clip_fraction=None)
    assert look(off, seen) == [None] * 3
    assert look(Drift(window=2), [reading({}, "train")] * 3) == [None] * 3, "an algorithm that reports none of them"


def apart(value, age=0.0, precision="fp32"):
    return replace(reading({"mismatch/mean": value, "age/max": age}, "train"), precision=precision)


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("bf16", 0.05)])
def test_engine_and_trainer_disagree_about_the_same_weights(precision, limit):
    seen = [apart(limit * much, precision=precision) for much in (0.5, 1.0, 1.01)]
    assert alarmed(Mismatch(), seen) == [False, False, True]
    finding = look(Mismatch(), seen)[-1]
    assert finding.figures[""] == finding.alarm.value == limit * 1.01
    assert finding.alarm.threshold == limit
    assert f"{limit:g} is allowed" in finding.alarm.text
    assert alarmed(Mismatch(at_most=2 * limit), seen) == [False] * 3
    assert alarmed(Mismatch(at_most=limit / 4), seen) == [True] * 3


def test_older_weights_may_differ_and_rows_without_both_log_probs_say_nothing():
    assert look(Mismatch(), [apart(3.0, age=1.0)]) == [None]
    assert look(Mismatch(), [reading({"ratio/mean": 1.0}, "train")]) == [None]
    assert alarmed(Mismatch(), [reading({"mismatch/mean": 3.0}, "train")]) == [True], "a rollout that knows of no age"
    watch = Watch(replace(Monitors.none(), mismatch=Mismatch()))
    said = [len(watch.look(one)[1]) for one in (apart(1.0), apart(1.0, age=1.0), apart(1.0), apart(0.0), apart(1.0))]
    assert said == [1, 0, 0, 0, 1], "a stale step between two is not the end of an alarm"


# ------------------------------------------------------------------------------------------ evaluations: the pictures


def shown(media, **more):
    return reading({}, media=media, **more)


def test_pictures_become_blurred_or_noisy():
    start = NOISE * 0.4
    for media, bound, word in ((NOISE * 0.1, 0.5, "blurred"), (NOISE * 0.96, 2.0, "noisy")):
        finding = look(Sharpness(grid=99), [shown(start), shown(media)])[-1]
        assert finding.alarm.threshold == bound
        assert word in finding.alarm.text
        assert finding.figures[""] == pytest.approx(float(media.max() / start.max()), rel=1e-4)
    assert not any(alarmed(Sharpness(), [shown(start), shown(NOISE * 0.6), shown(NOISE * 0.25 + 0.3)]))


def test_a_grid_of_blocks_shows():
    blocks = torch.zeros(16, 16)
    blocks[:8, :8] = blocks[8:, 8:] = 0.1
    start = NOISE * 0.4
    found = look(Sharpness(), [shown(start), shown(start + blocks * 3)])[-1]
    assert "grid of 8 pixels" in found.alarm.text
    assert not any(alarmed(Sharpness(period=5), [shown(start), shown(start + blocks * 3)]))
    assert look(Sharpness(), [shown(NOISE[:, :, :2])] * 2) == [None, None], "too small to have detail"
    flat = shown(torch.full((8, 3, 16, 16), 0.5))
    assert not any(alarmed(Sharpness(), [flat, flat])), "empty pictures that stay so"


def test_colours_move():
    red = NOISE.clone()
    red[:, 0] = (red[:, 0] + 0.3).clamp(max=1)
    finding = look(Colour(), [shown(NOISE), shown(red)])[-1]
    assert finding.alarm.value == pytest.approx(float((red - NOISE)[:, 0].mean()), abs=1e-6)
    assert "mean red of held-out pictures moved by +0.2" in finding.alarm.text
    grey = NOISE.mean(1, keepdim=True).expand_as(NOISE)
    assert "saturation" in look(Colour(), [shown(NOISE), shown(grey)])[-1].alarm.text
    assert not any(alarmed(Colour(), [shown(NOISE), shown(NOISE * 0.8), shown(NOISE)]))


def lettered(area, **more):
    return shown(NOISE, components={"ocr/area": torch.full((8,), area), "trained/strict": torch.ones(8)}, **more)


def test_letters_fill_the_picture():
    assert alarmed(TextArea(), [lettered(0.1), lettered(0.25), lettered(0.35)]) == [False, False, True], "three times"
    assert alarmed(TextArea(), [lettered(0.3), lettered(0.45), lettered(0.55)]) == [False, False, True], "half of it"
    assert not any(alarmed(TextArea(), [lettered(0.7), lettered(0.7)])), "it began with more"
    assert look(TextArea(), [lettered(math.nan)]) == [None]
    assert look(TextArea(), [shown(NOISE)]) == [None], "no such component"


def edited(copies):
    """Eight pictures, the first of which are their sources; the last one has none."""
    media = torch.cat([NOISE[:copies], 1 - NOISE[copies:]])
    return shown(media, sources=[*NOISE[:7], None])


def test_pictures_are_copies_of_their_sources():
    finding = look(Copy(), [edited(1), edited(6)])[-1]
    assert finding.figures[""] == finding.alarm.value == 6 / 7
    assert not any(alarmed(Copy(), [edited(1), edited(3)]))
    assert not any(alarmed(Copy(), [edited(6), edited(6)])), "it began so"
    plain = [torch.full((3, 40, 24), 0.1 * i) for i in range(8)]
    media = torch.stack([torch.full((3, 16, 16), 0.1 * i) for i in (0, 1, 2, 3, 5, 6, 7, 8)])
    assert look(Copy(), [shown(media, sources=plain)])[-1].figures[""] == 4 / 8, "sources of another size"
    assert look(Copy(), [shown(NOISE)]) == [None], "without sources"


# ----------------------------------------------------------------------------------------------------- sanity


def scoring_of(name, weight=1.0, **options):
    return Scoring([WeightedReward(name, registry.build("rewards", name, options), weight)])


def share(found):
    (value,) = found.values()
    return value


def test_a_reward_that_reads_captions_passes_and_one_that_does_not_is_refused():
    ask = Sanity(world=40)
    good = judged(ask, scoring_of("composition"), Processes().share, Processes().gather)
    assert good == {"composition": 1.0}
    assert refused(ask, good, "here") is None
    bad = judged(ask, scoring_of("brightness"), Processes().share, Processes().gather)
    assert 0.2 < share(bad) < 0.8
    error = refused(ask, bad, "stages.main.monitors.sanity")
    assert f"brightness {share(bad):.0%}, and 90% are asked for" in str(error)
    turned = judged(ask, scoring_of("composition", weight=-1.0), Processes().share, Processes().gather)
    assert turned == {"composition": 0.0}, "a negative weight trains it away"
    assert judged(ask, scoring_of("composition", weight=0.0), Processes().share, Processes().gather) == {}


def test_every_claim_is_changed_and_none_is_left_as_it_was():
    samples = Sanity(world=200).pairs()
    values, _ = registry.build("rewards", "composition", {"score": "strict"})(samples)
    assert values.view(-1, 2).tolist() == [[1.0, 0.0]] * 200


def test_pairs_of_a_file_and_what_was_not_scored(tmp_path):
    for name, level in (("dark", 20), ("light", 200)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{name}.png")
    line = {"prompt": "a picture", "chosen": "light.png", "rejected": "dark.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    ask = Sanity(path=str(tmp_path / "pairs.jsonl"))
    assert share(judged(ask, scoring_of("brightness"), Processes().share, Processes().gather)) == 1.0
    assert share(judged(ask, scoring_of("composition"), Processes().share, Processes().gather)) == 0.0, "no caption"


@pytest.mark.parametrize("options", [{}, {"path": "a", "world": 3}, {"world": 0}, {"world": 3, "at_least": 0.0}])
def test_options_of_sanity(options):
    with pytest.raises(ValueError, match=r"give one of|world must|at_least is"):
        Sanity(**options)


# ------------------------------------------------------------------------------------------------- all together


def test_an_alarm_is_said_once_until_it_is_over():
    watch = Watch(replace(Monitors.none(), colour=Colour()))
    white = torch.ones(8, 3, 16, 16)
    said = []
    for media in (NOISE, white, white, NOISE, white):
        columns, raised = watch.look(shown(media))
        assert set(columns) == {"monitor/colour"}
        said.append([one.monitor for one in raised])
        watch.memory = json.loads(json.dumps(watch.memory))
    assert said == [[], ["colour"], [], [], ["colour"]]


def test_a_run_in_which_nothing_changes_raises_nothing():
    parts = {"trained/strict": torch.arange(8.0), "ocr/area": torch.full((8,), 0.6)}
    row = {"held_out/reward": 0.5, "held_out/watched": 0.4, "held_out/watched_se": 0.0, "held_out/strict": 0.3}
    sources = list(NOISE)
    watch = Watch(Monitors())
    seen = set()
    for _ in range(25):
        columns, raised = watch.look(step(0.3, 0.95, kl=0.2, **{"mismatch/mean": 1e-5, "age/max": 0.0}))
        assert raised == []
        seen |= set(columns)
    for _ in range(4):
        columns, raised = watch.look(reading(row, rewards=(TRAINED, WATCHED), components=parts, sources=sources))
        assert raised == []
        seen |= set(columns)
    on = {name for name, one in vars(Monitors()).items() if one is not None}
    assert {name.split("/")[1] for name in seen} == on, "each of them looked"


def test_without_monitors_nothing_is_looked_at():
    watch = Watch(Monitors.none())
    assert watch.look(step()) == ({}, [])
    assert watch.memory == {}


def test_two_processes_see_what_one_sees():
    """Three and five of eight samples, groups torn apart: the figures are the same to the last bits, on both."""
    parts = {"trained/strict": torch.arange(8.0), "ocr/area": torch.linspace(0, 1, 8)}
    row = {"held_out/reward": 0.5, "held_out/strict": 0.3, "reward/group_std": 0.3, "zero_std": 0.0}
    options = Monitors(spread=Spread(window=1), diversity=Diversity(window=1))

    def figures(split, gather):
        watch, found = Watch(options), {}
        for media in (NOISE, NOISE * 0.5):
            for kind in ("train", "evaluation"):
                whole = reading(row, kind, media, components=parts, sources=list(NOISE.flip(0)))
                mine = torch.arange(8)[split]
                scores = replace(whole.scores, raw=whole.scores.raw[mine], valid=whole.scores.valid[mine])
                scores = replace(scores, components={name: one[mine] for name, one in parts.items()})
                found |= watch.look(replace(whole, samples=whole.samples.select(mine), scores=scores, gather=gather))[0]
        return found

    table, barrier, results = [None, None], threading.Barrier(2), [{}, {}]

    def process(rank, split):
        def gather(values):
            table[rank] = values
            barrier.wait(timeout=20)
            both = torch.cat(table)
            barrier.wait(timeout=20)
            return both

        results[rank] = figures(split, gather)

    threads = [threading.Thread(target=process, args=one) for one in enumerate((slice(0, 3), slice(3, 8)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = figures(slice(0, 8), lambda values: values)
    assert {name.split("/")[1] for name in alone} >= {"spread", "diversity", "sharpness", "colour", "text_area", "copy"}
    assert results[0] == results[1] == pytest.approx(alone)


def test_the_best_evaluation_is_the_earliest_of_the_best():
    watch = Watch(Monitors(colour=Colour(action="roll_back")))
    ats = []
    for at, watched in ((0, 0.3), (2, 0.5), (4, 0.5), (6, math.nan), (8, 0.4), (10, 0.6)):
        one = evaluated(0.1, watched)
        watch.look(replace(one, row=one.row | {"at": at}))
        ats.append(watch.best_at)
    assert ats == [0, 2, 2, 2, 2, 10]
    assert watch.memory["best"]["by"] == "held_out/watched"
    bare = Watch(Monitors(colour=Colour(action="roll_back")))
    bare.look(evaluated(0.1, 0.3, rewards=(TRAINED,)))
    assert bare.memory["best"]["by"] == "held_out/reward", "there is no panel"
    assert Watch(Monitors()).best_at is None, "nobody will go back"


def stepped(spread):
    return reading({"reward/group_std": spread, "zero_std": 0.0}, kind="train")


def test_a_shorter_window_begins_anew():
    """Ten values over five would be a spread that had been twice as large."""
    watch = Watch(Monitors(spread=Spread(window=4)))
    for _ in range(8):
        columns, _ = watch.look(stepped(0.3))
    assert columns["monitor/spread"] == pytest.approx(1.0)
    resumed = Watch(Monitors(spread=Spread(window=2)))
    resumed.memory = json.loads(json.dumps(watch.memory))
    seen = [resumed.look(stepped(0.3))[0] for _ in range(4)]
    assert ["monitor/spread" in one for one in seen] == [False, False, False, True]
    assert seen[-1]["monitor/spread"] == pytest.approx(1.0)


def test_an_alarm_that_now_does_something_else_is_raised_again():
    """It stood when the run was stopped; whoever then writes `stop` wants it to stop."""
    watch = Watch(Monitors(colour=None, held_out=HeldOut(in_a_row=1)))
    falls = [evaluated(0.1, 0.5), evaluated(0.3, 0.1)]
    assert [len(watch.look(one)[1]) for one in [*falls, falls[1]]] == [0, 1, 0], "said once"
    for options, again in (({}, 0), ({"action": "stop"}, 1)):
        resumed = Watch(Monitors(colour=None, held_out=HeldOut(in_a_row=1, **options)))
        resumed.memory = json.loads(json.dumps(watch.memory))
        assert [one.action for one in resumed.look(falls[1])[1]] == ["stop"] * again


def test_the_best_by_another_column_is_looked_for_anew():
    def watching(by):
        return Watch(Monitors(best_by=by, colour=Colour(action="roll_back")))

    watch = watching("held_out/reward")
    for at, total, watched in ((0, 0.9, 0.1), (2, 0.5, 0.2)):
        one = evaluated(total, watched)
        watch.look(replace(one, row=one.row | {"at": at}))
    assert watch.best_at == 0
    resumed = watching("held_out/watched")
    resumed.memory = json.loads(json.dumps(watch.memory))
    one = evaluated(0.4, 0.3)
    resumed.look(replace(one, row=one.row | {"at": 4}))
    assert (resumed.best_at, resumed.memory["best"]["by"]) == (4, "held_out/watched")
    kept = watching(None)
    kept.memory = json.loads(json.dumps(watch.memory))
    kept.look(replace(one, row=one.row | {"at": 4}))
    assert kept.best_at == 0, "it is asked for nothing else"


def test_best_by_is_a_column_of_the_evaluations():
    watch = Watch(Monitors(best_by="held_out/wached", colour=Colour(action="roll_back")))
    with pytest.raises(RecipeError, match=r"no 'held_out/wached'. Did you mean 'held_out/watched'\?"):
        watch.look(evaluated(0.1, 0.3))
    with pytest.raises(ValueError, match="best_by is a column"):
        Monitors(best_by="strict")


@pytest.mark.parametrize(
    "make",
    [
        lambda: HeldOut(standard_errors=0.0),
        lambda: Spread(window=0),
        lambda: Diversity(least=-1.0),
        lambda: Drift(kl=math.nan),
        lambda: Mismatch(at_most=0.0),
        lambda: Sharpness(least=3.0),
        lambda: Colour(most=0.0),
        lambda: TextArea(times=0.0),
        lambda: Copy(near=0.0),
    ],
)
def test_options_are_checked(make):
    with pytest.raises(ValueError, match="must be"):
        make()


# ------------------------------------------------------------------------------------------------------ in a run

STAGE = {
    "data": {"name": "world", "per_step": 2, "group": 4},
    "rollout": {"name": "local", "steps": 2},
    "algorithm": {"name": "flow_grpo", "clip": 2e-3, "window": 1, "shared_noise": True},
    "rewards": {"brightness": 1.0},
    "learner": {"lr": 3e-3, "batch": 8, "ema": 0.5},
    "evaluate": {"every": 1, "held_out": 8},
    "steps": 4,
}


@pytest.fixture(autouse=True)
def global_state():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
    yield
    torch.set_num_threads(before[0])
    torch.use_deterministic_algorithms(before[1])
    torch.set_rng_state(before[2])


@pytest.fixture(scope="module")
def build(small_backbone):
    def make(stages, **options):
        run = {"checkpoint_every": 1, "keep_checkpoints": 99, "threads": 1, "wandb": "disabled", "device": "cpu"}
        described = {name: {**STAGE, **changes} for name, changes in stages.items()}
        policy = {"backbone": {"name": "tiny", "path": str(small_backbone)}}
        return recipe.resolve({"run": {**run, **options}, "policy": policy, "stages": described})

    return make


def go(setup, folder, resume=False):
    session.run(setup, folder, Processes(), resume=resume, quiet=True)
    return Metrics.read(folder)


def events(rows, name):
    return [row for row in rows if row["kind"] == "event" and row["event"] == name]


def measured(rows):
    kept = [row for row in rows if row["kind"] != "event" or row["event"] in ("alarm", "rolled_back")]
    return [{key: one for key, one in row.items() if "seconds" not in key} for row in kept]


def same_weights(one, other):
    files = sorted(file.name for file in (one / "weights").glob("*.safetensors"))
    assert files
    for name in files:
        a, b = load_file(one / "weights" / name), load_file(other / "weights" / name)
        assert all(torch.equal(a[key], b[key]) for key in a)


def same_checkpoint(one, other):
    a, b = checkpoint.newest(one), checkpoint.newest(other)
    assert (a.at, a.numbers) == (b.at, b.numbers)
    assert [name for name in a.tensors if not torch.equal(a.tensors[name], b.tensors[name])] == []


def cut(whole, folder, at):
    """A copy of a run as if it had been killed some time after its checkpoint of step `at`."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("weights"))
    for saved in (folder / "checkpoints").iterdir():
        if int(saved.name) > at:
            shutil.rmtree(saved)
    return folder


def close(samples):
    """Best at the brightness that the policy has after two steps, as it grows brighter."""
    luma = samples.media.mean((0, 2, 3)) @ torch.tensor([0.2126, 0.7152, 0.0722])
    return -(luma - 0.2531).abs().expand(len(samples))


def hacked(build, action="roll_back", stages=("main",), **options):
    """Brightness is trained on and `close` is watched; in the fourth step the colour monitor has had enough."""
    watched = {"colour": {"action": action, "most": 0.045}, "diversity": None}
    setup = build({name: {"monitors": watched, "steps": 6} for name in stages}, **options)
    rewards = (*setup.stages[0].rewards, WeightedReward("close", close, 0.0))
    return replace(setup, stages=tuple(replace(stage, rewards=rewards) for stage in setup.stages))


@pytest.fixture(scope="module")
def rolled_back(build, tmp_path_factory):
    """(setup, folder, rows) of a run that went back from step 4 to step 2."""
    setup = hacked(build)
    folder = tmp_path_factory.mktemp("rolled") / "run"
    return setup, folder, go(setup, folder)


def test_an_alarm_rolls_back_to_the_best_evaluation(rolled_back):
    _, folder, rows = rolled_back
    seen = [(row["step"], row.get("restored")) for row in rows if row["kind"] == "evaluation"]
    assert seen == [(0, None), (1, None), (2, None), (3, None), (4, None), (4, 2)]
    found = {row["monitor"]: row for row in events(rows, "alarm")}
    assert set(found) == {"colour", "held_out"}
    assert (found["colour"]["stage"], found["colour"]["step"], found["colour"]["at"]) == ("main", 4, 4)
    assert found["colour"]["action"] == "roll_back"
    assert found["colour"]["value"] > found["colour"]["threshold"] == 0.045
    assert found["held_out"]["action"] == "warn"
    assert "close, which is not trained on" in found["held_out"]["text"]
    (back,) = events(rows, "rolled_back")
    assert back["to"] == 2
    assert "back to the weights of step 2, the best by held_out/close" in back["text"]
    evaluations = {(row["step"], row.get("restored")): row for row in rows if row["kind"] == "evaluation"}
    then, now = ({k: v for k, v in evaluations[key].items() if "held_out/" in k} for key in ((2, None), (4, 2)))
    assert then == now, "the same weights draw the same pictures"
    good, last = checkpoint.at(folder, 2), checkpoint.newest(folder)
    assert (last.at, last.numbers["done"]) == (4, 4)
    assert all(torch.equal(good.tensors[name], last.tensors[name]) for name in good.tensors), (
        "all sets, and the moments"
    )
    assert events(rows, "finished")


def test_the_figures_are_columns_of_the_record(rolled_back):
    rows = rolled_back[2]
    shifts = [row["monitor/colour"] for row in rows if row["kind"] == "evaluation" and "restored" not in row]
    assert shifts[0] == 0
    assert sorted(shifts) == shifts
    assert shifts[3] < 0.045 < shifts[4]


@pytest.mark.parametrize(
    "at", [0, 1, 3, 4], ids=["at the start", "before the best", "before the alarm", "after it all"]
)
def test_a_run_that_was_killed_ends_with_the_same_weights(rolled_back, tmp_path, at):
    setup, folder, rows = rolled_back
    again = cut(folder, tmp_path / "run", at)
    assert checkpoint.newest(again).at == at
    assert measured(go(setup, again, resume=True)) == measured(rows)
    same_checkpoint(folder, again)
    same_weights(folder, again)


def test_killed_between_the_roll_back_and_its_checkpoint(rolled_back, tmp_path, monkeypatch):
    setup, folder, rows = rolled_back
    real = checkpoint.save

    def save(run, at, *rest, **more):
        if at == 4:
            raise KeyboardInterrupt
        return real(run, at, *rest, **more)

    killed = tmp_path / "run"
    monkeypatch.setattr("rlkit.checkpoint.save", save)
    with pytest.raises(KeyboardInterrupt):
        go(setup, killed)
    monkeypatch.setattr("rlkit.checkpoint.save", real)
    assert checkpoint.newest(killed).at == 3
    assert measured(go(setup, killed, resume=True)) == measured(rows)
    same_checkpoint(folder, killed)
    same_weights(folder, killed)


def test_the_best_checkpoint_is_kept_beside_the_newest(rolled_back, build, tmp_path):
    setup = hacked(build, keep_checkpoints=1, checkpoint_every=3)
    rows = go(setup, tmp_path)
    assert measured(rows) == measured(rolled_back[2])
    assert sorted(one.name for one in (tmp_path / "checkpoints").iterdir()) == ["000002", "000004"]
    same_weights(rolled_back[1], tmp_path)


def test_the_pictures_of_the_hack_and_of_what_was_restored_are_both_kept(rolled_back):
    _, folder, _ = rolled_back
    pictures = {at: (folder / "samples" / f"{at}.png").read_bytes() for at in ("000002", "000004", "000004-alarm")}
    assert pictures["000004"] == pictures["000002"] != pictures["000004-alarm"]


def test_the_report_tells_of_alarms(rolled_back):
    _, folder, _ = rolled_back
    facts = report.summary(folder)
    colour = next(one for one in facts["alarms"] if one["monitor"] == "colour")
    assert (colour["step"], colour["stage"], colour["action"], colour["restored"]) == (4, "main", "roll_back", 2)
    assert facts["held_out"]["reward"]["after"] < 0.26, "after is what was restored"
    assert "Monitors raised 2 alarms, the first at step 4" in report.sentence(facts)
    assert "The weights of step 2 were restored." in report.sentence(facts)
    page = report.write(folder).read_text()
    assert "<h2>Alarms</h2>" in page
    assert "rolled back to step 2" in page
    assert page.count('class="alarm"') >= 4, "a mark for each of two alarms in each large chart"
    assert "<h2>Monitors</h2>" in page
    assert (folder / "after.png").stat().st_size > 0


def test_stop_ends_the_run_and_later_stages_do_not_begin(build, tmp_path):
    setup = hacked(build, "stop", ("first", "second"))
    rows = go(setup, tmp_path)
    assert {row["stage"] for row in rows} == {"first"}
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    (alarm,) = (row for row in events(rows, "alarm") if row["monitor"] == "colour")
    assert "the run ends here" in alarm["text"]
    assert events(rows, "finished")
    assert (tmp_path / "weights").is_dir()
    again = go(setup, tmp_path, resume=True)
    assert measured(again) == measured(rows), "resuming does not argue with the alarm"
    more = go(hacked(build, "warn", ("first", "second")), tmp_path, resume=True)
    assert [row["at"] for row in more if row["kind"] == "train"] == list(range(1, 13)), "changing the monitor does"


def test_after_a_roll_back_the_next_stage_begins_with_what_was_restored(build, tmp_path):
    setup = hacked(build, "roll_back", ("first", "second"))
    setup = replace(setup, stages=(setup.stages[0], replace(setup.stages[1], steps=1)))
    rows = [row for row in go(setup, tmp_path / "run") if row["kind"] == "evaluation"]
    restored = next(row for row in rows if row.get("restored") == 2)
    begun = next(row for row in rows if row["stage"] == "second")
    assert {k: v for k, v in restored.items() if "held_out/" in k} == {
        k: v for k, v in begun.items() if "held_out/" in k
    }
    cutting = cut(tmp_path / "run", tmp_path / "killed", 4)  # at the second stage's start
    assert checkpoint.newest(cutting).numbers["stage"] == "second"
    go(setup, cutting, resume=True)
    same_checkpoint(tmp_path / "run", cutting)
    same_weights(tmp_path / "run", cutting)


def test_without_held_out_pictures_there_is_nothing_to_go_back_to(build, tmp_path):
    spread = {"window": 1, "least": 99.0, "action": "roll_back"}
    setup = build({"main": {"monitors": {"spread": spread}, "evaluate": {"every": 0, "held_out": 0}}})
    rows = go(setup, tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert events(rows, "rolled_back")[0]["text"].startswith("nothing to go back to")


def test_a_checkpoint_to_go_back_to_that_is_damaged_is_an_error(rolled_back, tmp_path):
    setup, folder, _ = rolled_back
    again = cut(folder, tmp_path / "run", 3)
    (again / "checkpoints" / "000002" / "tensors.safetensors").write_bytes(b"?")
    with pytest.raises(CheckpointError, match="the checkpoint to go back to is damaged"):
        go(setup, again, resume=True)


def test_rewards_that_fail_the_sanity_check_are_not_trained_on(build, tmp_path):
    setup = build({"main": {"monitors": {"sanity": {"world": 20}}}})
    with pytest.raises(RewardError, match=r"stages\.main\.monitors\.sanity: the rewards do not tell good pictures"):
        go(setup, tmp_path / "stop")
    rows = Metrics.read(tmp_path / "stop")
    assert [row["event"] for row in rows] == ["started", "alarm"]
    assert rows[1]["monitor/sanity/brightness"] == rows[1]["value"] < 0.9
    warned = build({"main": {"monitors": {"sanity": {"world": 20, "action": "warn"}}, "steps": 1}})
    rows = go(warned, tmp_path / "warn")
    assert len(events(rows, "alarm")) == 1
    assert events(rows, "finished")


# ---------------------------------------------------------------------------------------------------- in a recipe


def test_monitors_of_a_recipe(build):
    assert build({"main": {}}).stages[0].monitors == Monitors()
    (stage,) = build({"main": {"monitors": {"spread": None, "held_out": {"in_a_row": 3}}}}).stages
    assert stage.monitors == Monitors(spread=None, held_out=HeldOut(in_a_row=3))
    off = build({"main": {"monitors": None}})
    assert off.stages[0].monitors == Monitors.none()
    assert recipe.resolve(off.recipe).stages == off.stages
    with pytest.raises(RecipeError, match=r"no option 'held_ot'. Did you mean 'held_out'\?"):
        build({"main": {"monitors": {"held_ot": {}}}})
    with pytest.raises(RecipeError, match=r"monitors\.colour\.action: must be one of 'warn', 'stop', 'roll_back'"):
        build({"main": {"monitors": {"colour": {"action": "roll back"}}}})


def test_an_alarm_reaches_whoever_follows_the_mirror(tmp_path, monkeypatch):
    class Page:
        def __init__(self):
            self.alerts = []

        def log(self, row):
            pass

        def alert(self, title, text):
            self.alerts.append((title, text))

        def finish(self):
            pass

    page = Page()
    monkeypatch.setattr("rlkit.mirrors.mirror._start_wandb", lambda *_, **__: page)
    tracker = Tracker(tmp_path, config={}, wandb="offline", quiet=True)
    row = {"kind": "event", "stage": "main", "step": 3, "at": 3}
    tracker.write(row | {"event": "resumed", "text": "no alarm"})
    tracker.write(row | {"event": "alarm", "monitor": "colour", "text": "too bright"})
    tracker.close()
    assert page.alerts == [("main, step 3: colour", "too bright")]
