"""Suites: files in the benchmarks' published forms become cases, rewards are chosen, and means get their intervals."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from painting import draw_picture

from rlkit.data.prompts import FilePrompts, WorldPrompts
from rlkit.errors import DataError, RecipeError
from rlkit.evaluation import formats as suite_formats
from rlkit.evaluation import suites
from rlkit.evaluation.suites import SUITES, cases_of, named, reward_of, summed
from rlkit.registry import build
from rlkit.scorer import Asking
from rlkit.scoring import WeightedReward

CLAIM = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}
QUESTION = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple"
QUESTION += ",question_natural_language"


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines), encoding="utf-8")
    return path


# ---- published forms -------------------------------------------------------------------------------------------------


def test_geneval_keeps_claims_and_tags(tmp_path: Path) -> None:
    two = {**CLAIM, "tag": "counting", "exclude": [{"class": "circle", "count": 3}], "prompt": "a circle again"}
    cases = suite_formats.geneval(write(tmp_path / "evaluation_metadata.jsonl", CLAIM, "", two))
    assert [(one.key, one.category) for one in cases] == [("00000", "single_object"), ("00001", "counting")]
    prompt = cases[1].asked.read()
    assert (prompt.id, prompt.text, prompt.kind) == (1, "a circle again", "counting")
    assert prompt.metadata["exclude"] == [{"class": "circle", "count": 3}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({**CLAIM, "prompt": " "}, "no text 'prompt'"),
        ({"Tag": "x", "include": [], "prompt": "p"}, "no text 'tag' here. Did you mean 'Tag'?"),
        ({**CLAIM, "include": []}, "no claims that can be checked: .*include"),
        ("a photo of a circle", "not a JSON object"),
    ],
)
def test_a_bad_line_of_geneval_is_named(line: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"e\.jsonl:2: {said}"):
        suite_formats.geneval(write(tmp_path / "e.jsonl", CLAIM, line))


def test_dpg_is_a_folder_of_texts_or_a_table_of_questions(tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    write(folder / "b.txt", "two", "lines")
    write(folder / "a.txt", "one")
    assert [(one.key, one.asked.read().text) for one in suite_formats.dpg(folder)] == [("a", "one"), ("b", "two lines")]
    rows = ['a,"one, long",k,1,0,entity,whole,t1,Is it one?', 'a,"one, long",k,2,1,entity,part,t2,Is it long?']
    table = write(tmp_path / "dpg_bench.csv", QUESTION, *rows, "b,two,k,1,0,entity,whole,t,Is it two?")
    first, second = suite_formats.dpg(table)
    assert (first.key, first.asked.prompt.text, second.key) == ("a", "one, long", "b")
    asked = first.asked.prompt.metadata["questions"]
    assert [(one["proposition_id"], one["dependency"]) for one in asked] == [("1", "0"), ("2", "1")]
    assert asked[1]["question_natural_language"] == "Is it long?"


def test_bad_files_of_dpg_are_named(tmp_path: Path) -> None:
    write(tmp_path / "empty.txt", "")
    with pytest.raises(DataError, match=r"empty\.txt:1: no prompt in this file"):
        suite_formats.dpg(tmp_path)
    with pytest.raises(DataError, match="no prompts here"):
        suite_formats.dpg(write(tmp_path / "d.csv", QUESTION))
    with pytest.raises(DataError, match=r"d\.csv:3: item 'a' has another text"):
        suite_formats.dpg(write(tmp_path / "d.csv", QUESTION, "a,one,k,1,0,e,w,t,q?", "a,other,k,2,0,e,w,t,q?"))
    with pytest.raises(DataError, match=r"d\.csv:2: no text 'question_natural_language'"):
        suite_formats.dpg(write(tmp_path / "d.csv", QUESTION, "a,one,k,1,0,e,w,t,"))
    with pytest.raises(DataError, match=r"d\.json: is no \.csv file"):
        suite_formats.dpg(write(tmp_path / "d.json", "[]"))


def test_oneig_has_ids_that_are_unique_in_a_category(tmp_path: Path) -> None:
    rows = ["Portrait,000,a face,T,short,", "Text_Rendering,000,the word OK,T,short,"]
    table = write(tmp_path / "OneIG-Bench.csv", "category,id,prompt_en,type,prompt_length,class", *rows)
    first, second = suite_formats.oneig(table)
    assert (first.key, second.key, second.category) == ("Portrait/000", "Text_Rendering/000", "Text_Rendering")
    assert second.asked.prompt.text == "the word OK"
    (chinese,) = suite_formats.oneig(write(tmp_path / "o.json", [{"category": "P", "id": 3, "prompt_cn": "red"}]))
    assert (chinese.key, chinese.asked.prompt.text) == ("P/3", "red")
    with pytest.raises(DataError, match="two prompts are called 'P/0'"):
        suite_formats.oneig(write(tmp_path / "o.csv", "category,id,prompt_en", "P,0,one", "P,0,two"))
    with pytest.raises(DataError, match=r"o\.json entry 0: no text 'prompt_en'"):
        suite_formats.oneig(write(tmp_path / "o.json", [{"category": "P", "id": "0", "prompt": "red"}]))
    with pytest.raises(DataError, match=r"o\.json:2: not JSON"):
        suite_formats.oneig(write(tmp_path / "o.json", "[{},", "{]"))
    with pytest.raises(DataError, match="is no list of prompts"):
        suite_formats.oneig(write(tmp_path / "o.json", "{}"))


def edit(key: str, language: str = "en", **more: Any) -> dict[str, Any]:
    row = {"task_type": "style_change", "key": key, "instruction": "make it blue", "instruction_language": language}
    return {**row, "input_image": "a.png", "Intersection_exist": True, **more}


def test_gedit_reads_the_picture_to_edit(tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.png", 1)
    one, two = suite_formats.gedit(write(tmp_path / "g.jsonl", edit("k1"), edit("k2", task_type="text_change")))
    assert (one.key, one.category, two.category) == ("en/k1", "style_change", "text_change")
    prompt = one.asked.read()
    assert (prompt.text, prompt.source is not None and tuple(prompt.source.shape)) == ("make it blue", (3, 4, 6))
    both = suite_formats.gedit(write(tmp_path / "g.jsonl", edit("k1"), edit("k1", "cn")))
    assert [one.category for one in both] == ["en/style_change", "cn/style_change"]


def test_gedit_as_a_data_set_with_pictures_in_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    pictures = {name: [Image.new("RGB", (6, 4), "red")] for name in ("input_image", "input_image_raw")}
    words = {key: [value] for key, value in edit("k1").items() if key != "input_image"}
    kinds = dict.fromkeys(pictures, datasets.Image())
    table = datasets.Dataset.from_dict(words)
    for name, column in pictures.items():
        table = table.add_column(name, [{"bytes": _png(column[0]), "path": None}])
    table = table.cast(datasets.Features({**table.features, **kinds}))
    table.to_parquet(str(tmp_path / "g.parquet"))
    (case,) = suite_formats.gedit(tmp_path / "g.parquet")
    source = case.asked.read().source
    assert case.key == "en/k1"
    assert source is not None
    assert source[0].min() == 1


def _png(image: Any) -> bytes:
    import io

    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_bad_rows_of_gedit_are_named(tmp_path: Path) -> None:
    file = tmp_path / "g.jsonl"
    with pytest.raises(DataError, match=r"g\.jsonl:2: no text 'instruction_language'"):
        suite_formats.gedit(write(file, edit("k1"), edit("k2", instruction_language=None)))
    with pytest.raises(DataError, match=r"g\.jsonl:1: no 'input_image' to edit"):
        suite_formats.gedit(write(file, edit("k1", input_image=None)))
    with pytest.raises(DataError, match=r'g\.jsonl:1: no "instruction" in this line'):
        suite_formats.gedit(write(file, edit("k1", instruction="")))
    with pytest.raises(DataError, match=r"g\.jsonl:1: the source picture .*a\.png does not exist"):
        suite_formats.gedit(write(file, edit("k1")))[0].asked.read()


def test_imgedit_maps_keys_to_edits(tmp_path: Path) -> None:
    (tmp_path / "animal").mkdir()
    draw_picture(tmp_path / "animal" / "1.png", 1)
    row = {"id": "animal/1.png", "prompt": "remove it", "edit_type": "remove"}
    (case,) = suite_formats.imgedit(write(tmp_path / "basic_edit.json", {"1082": row}))
    assert (case.key, case.category, case.asked.prompt.text) == ("1082", "remove", "remove it")
    assert case.asked.read().source is not None
    for bad, said in (({**row, "edit_type": None}, "entry '7': no text 'edit_type'"), ([], "entry '7': not a JSON")):
        with pytest.raises(DataError, match=said):
            suite_formats.imgedit(write(tmp_path / "b.json", {"7": bad}))
    with pytest.raises(DataError, match="no mapping"):
        suite_formats.imgedit(write(tmp_path / "b.json", [row]))


def test_omnicontext_reads_all_references(tmp_path: Path) -> None:
    draw_picture(tmp_path / "a.png", 1)
    draw_picture(tmp_path / "b.png", 2)
    row = {"key": "k", "task_type": "multi_object", "instruction": "both", "input_images": ["a.png", "b.png"]}
    (case,) = suite_formats.omnicontext(write(tmp_path / "o.jsonl", row))
    assert (case.key, case.category, len(case.asked.read().references)) == ("k", "multi_object", 2)
    with pytest.raises(DataError, match=r"o\.jsonl:1: no 'input_images'"):
        suite_formats.omnicontext(write(tmp_path / "o.jsonl", {**row, "input_images": []}))


def test_genevolve_keeps_the_true_picture_from_the_policy(tmp_path: Path) -> None:
    draw_picture(tmp_path / "gt.png", 1)
    rows = [
        {"id": 4, "prompt": "the flag", "gt_image": "gt.png", "meta": {"eval_type": "knowledge", "category": "art"}},
        {"prompt": "a poster", "truth": "a red circle", "target_text": ["OK"]},
    ]
    pictured, told = suite_formats.genevolve(write(tmp_path / "g.json", rows))
    assert (pictured.key, pictured.category, told.key, told.category) == ("4", "knowledge", "1", "all")
    prompt = pictured.asked.read()
    assert prompt.source is None
    assert prompt.references == ()
    assert len(pictured.truth) == 1
    assert (told.asked.prompt.metadata["truth"], told.asked.prompt.target_text) == ("a red circle", ("OK",))
    with pytest.raises(DataError, match=r"g\.jsonl:1: no truth to judge by"):
        suite_formats.genevolve(write(tmp_path / "g.jsonl", {"prompt": "the flag"}))


# ---- choosing --------------------------------------------------------------------------------------------------------

WORLD = SimpleNamespace(data=WorldPrompts(2, 2), rewards=())


def test_the_world_has_each_prompt_once() -> None:
    stage: Any = WORLD
    panel = [one.text for one in stage.data.held_out(400)]
    cases = cases_of(named("world"), None, stage, 400)
    assert len(panel) == 400
    assert sorted(one.asked.read().text for one in cases) == sorted(set(panel))
    assert len({one.key for one in cases}) == len(cases) < 400


def test_what_is_no_suite_and_no_file() -> None:
    stage: Any = WORLD
    with pytest.raises(RecipeError, match="Did you mean 'gedit'"):
        named("gedti")
    with pytest.raises(RecipeError, match="--prompts: the suite world has prompts of its own"):
        cases_of(named("world"), Path("x"), stage, 4)
    with pytest.raises(RecipeError, match="--prompts: the suite gedit reads your copy"):
        cases_of(named("gedit"), None, stage, 4)
    with pytest.raises(DataError, match="nowhere: no such file"):
        cases_of(named("gedit"), Path("nowhere"), stage, 4)
    other: Any = SimpleNamespace(data=FilePrompts("x.txt", 1, 2), rewards=())
    with pytest.raises(RecipeError, match="is for recipes on the embedded world"):
        cases_of(named("world"), None, other, 4)


JUDGE = {"endpoints": {"urls": ["http://127.0.0.1:1"], "key_env": None}, "model": "m"}


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_builds_a_reward_with_the_column_that_counts(name: str) -> None:
    suite, stage = SUITES[name], WORLD
    reward = reward_of(suite, stage, JUDGE if suite.judged else None)  # type: ignore[arg-type]
    assert reward.name == suite.reward
    assert not suite.column or suite.column in reward.reward.components  # type: ignore[attr-defined]
    assert all(getattr(reward.reward, key) == value for key, value in suite.fixed.items())


def test_the_recipes_own_reward_lends_its_options() -> None:
    own = build("rewards", "geneval", {"detector": "world", "score": "mixed", "at_least": False})
    stage: Any = SimpleNamespace(rewards=(WeightedReward("mine", own, 0.5, asking=Asking(batch=3), entry="geneval"),))
    found = reward_of(named("geneval"), stage, None)
    reward: Any = found.reward
    assert (reward.detector, reward.at_least, found.asking.batch) == ("world", False, 3)
    assert reward.score == "strict", "what makes it the suite is the suite's"
    assert found.weight == 1
    plain: Any = reward_of(named("geneval"), WORLD, None, {"detector": "world"}).reward  # type: ignore[arg-type]
    assert (plain.detector, plain.at_least) == ("world", True)


def test_a_judge_is_the_command_lines_or_the_recipes() -> None:
    own = build("rewards", "vlm_judge", {"endpoints": {"urls": ["http://127.0.0.1:2"]}, "mode": "yes_no"})
    stage: Any = SimpleNamespace(rewards=(WeightedReward("vlm_judge", own, 1.0),))
    reward: Any = reward_of(named("gedit"), stage, None).reward
    assert (reward.mode, reward.endpoints.urls) == ("viescore", ("http://127.0.0.1:2",))
    reward = reward_of(named("gedit"), stage, JUDGE).reward
    assert (reward.endpoints.urls, reward.model) == (("http://127.0.0.1:1",), "m")
    with pytest.raises(RecipeError, match="the suite gedit needs a judge"):
        reward_of(named("gedit"), WORLD, None)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="asks no judge"):
        reward_of(named("world"), stage, JUDGE)
    with pytest.raises(RecipeError, match="Did you mean 'num_pass'"):
        reward_of(named("gedit"), stage, JUDGE, {"num_pas": 2})


# ---- summing up ------------------------------------------------------------------------------------------------------


def test_means_of_prompts_and_of_categories_by_hand() -> None:
    values = {"a": {"p": [0.0, 1.0], "q": [1.0, 1.0]}, "b": {"r": [0.0], "s": [0.0, 0.0], "t": [0.25], "u": []}}
    by_prompt, by_category = summed(values, "prompts"), summed(values, "categories")
    assert by_prompt.categories["a"].mean == pytest.approx(0.75)
    assert by_prompt.categories["b"].mean == pytest.approx(0.25 / 3)
    assert (by_prompt.categories["b"].prompts, by_prompt.overall.prompts) == (3, 5)
    assert by_prompt.overall.mean == pytest.approx((0.5 + 1 + 0.25) / 5)
    assert by_category.overall.mean == pytest.approx((0.75 + 0.25 / 3) / 2)


def test_the_interval_is_that_of_the_normal_law() -> None:
    rng = np.random.default_rng(1)
    numbers = rng.normal(0.5, 0.2, 400)
    found = summed({"a": {str(i): [one] for i, one in enumerate(numbers)}}, "prompts").overall
    error = numbers.std() / math.sqrt(400)
    assert found.error == pytest.approx(error, rel=0.06)  # 2000 draws know it to 1.6 %
    assert found.mean is not None
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)


def test_seeds_of_one_prompt_are_not_new_observations() -> None:
    rng = np.random.default_rng(2)
    numbers = rng.normal(0.5, 0.2, 200)
    one = summed({"a": {str(i): [x] for i, x in enumerate(numbers)}}, "prompts").overall
    eight = summed({"a": {str(i): [x] * 8 for i, x in enumerate(numbers)}}, "prompts").overall
    assert eight.error == pytest.approx(one.error, rel=1e-6), "eight copies must not look like eight times the prompts"


def test_the_error_of_a_mean_of_categories_by_hand() -> None:
    rng = np.random.default_rng(3)
    values = {name: rng.normal(mean, 0.3, n) for name, mean, n in (("a", 0.1, 50), ("b", 0.9, 200))}
    found = summed({k: {str(i): [x] for i, x in enumerate(v)} for k, v in values.items()}, "categories").overall
    error = math.sqrt(sum(v.var() / len(v) for v in values.values())) / 2
    assert found.error == pytest.approx(error, rel=0.08), "categories are fixed: only prompts within them are drawn"


def test_no_spread_is_made_up() -> None:
    lone = summed({"a": {"p": [1.0, 0.0]}, "b": {"q": [1.0], "r": [0.0]}, "c": {"s": []}}, "categories")
    assert (lone.categories["a"].mean, lone.categories["a"].low, lone.categories["a"].error) == (0.5, None, None)
    assert (lone.overall.mean, lone.overall.low) == (0.5, None)
    assert (lone.categories["c"].mean, lone.categories["c"].prompts) == (None, 0)
    nothing = summed({"c": {"s": []}}, "prompts").overall
    assert (nothing.mean, nothing.prompts) == (None, 0)


def test_two_calls_give_the_same_interval() -> None:
    values = {"a": {str(i): [i % 3 / 2] for i in range(20)}}
    assert suites.summed(values, "prompts") == suites.summed(values, "prompts")
