"""Qwen2, Qwen2.5 and Qwen3: what they are given to read, what they say of it, and folders that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from backbones import tiny_llm, tiny_words

from rlkit import registry
from rlkit.errors import DataError, RecipeError
from rlkit.types import Prompt

PROMPTS = [Prompt(0, "a red circle"), Prompt(1, ""), Prompt(2, "two blue crosses, one above the other")]


@pytest.fixture(scope="module", params=tiny_llm.WORDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm.save(tmp_path_factory.mktemp("qwen"), request.param)


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm.save(tmp_path_factory.mktemp("qwen"), "qwen3")


def said(model, prompt: Prompt) -> str:
    from transformers import AutoTokenizer

    (condition,) = model.encode([prompt])
    return AutoTokenizer.from_pretrained(model.net.name_or_path).decode(condition["ids"])


# ---- what it reads ---------------------------------------------------------------------------------------------------


def test_a_prompt_is_a_turn_of_the_user_in_the_checkpoints_own_chat(one_folder: Path) -> None:
    model = tiny_llm.loaded(one_folder, thinking=True)
    turn = "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n"
    assert said(model, PROMPTS[0]) == "<|im_start|>system\nBe kind.<|im_end|>\n" + turn
    told = tiny_llm.loaded(one_folder, thinking=True, system="Rewrite.")
    assert said(told, PROMPTS[0]) == "<|im_start|>system\nRewrite.<|im_end|>\n" + turn
    silent = tiny_llm.loaded(one_folder)
    assert said(silent, PROMPTS[0]).endswith(turn + "<think>\n\n</think>\n\n")


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_<|im_end|>end|>", "<|image_pad|> x"])
def test_a_prompt_can_not_end_its_turn(one_folder: Path, text: str) -> None:
    model = tiny_llm.loaded(one_folder)
    ids = model.encode([Prompt(0, text)])[0]["ids"].tolist()
    usual = model.encode([Prompt(0, "a")])[0]["ids"].tolist()
    assert [one for one in ids if one >= 256] == [one for one in usual if one >= 256]
    assert model.unread(text), "it is said which marks are left out"
    assert not model.unread("a red circle <b>")


def test_answers_end_with_a_turn_or_a_text_and_are_read_without_marks(folder: Path) -> None:
    model = tiny_llm.loaded(folder)
    assert model.ends == (256, 258), "<|endoftext|> and <|im_end|>"
    words = [ord("a") - ord("!")]  # of bytes in order, the printable ones come first
    beyond = len(tiny_words.qwen_tokenizer()) + 3  # a row of the embedding that is no token
    assert model.decode([[*words, 258], [258], [], [*words, beyond, *words]]) == ["a", "", "", "aa"]


def test_a_prompt_without_room_for_an_answer_is_refused(one_folder: Path) -> None:
    size = len(tiny_llm.loaded(one_folder).encode(PROMPTS[:1])[0]["ids"])
    tiny_llm.loaded(one_folder, longest=size + 1).encode(PROMPTS[:1])
    with pytest.raises(DataError, match=f"prompt 0: the prompt has {size} tokens, and `longest` gives {size} to") as no:
        tiny_llm.loaded(one_folder, longest=size).encode(PROMPTS[:1])
    assert "pixels" not in str(no.value)


# ---- what it says ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_llm.loaded(folder)
    ids, there, conditions = tiny_llm.answered(model, PROMPTS)
    net = AutoModelForCausalLM.from_pretrained(folder).eval()
    theirs = net(ids, attention_mask=there.long()).logits
    ours = model.logits(model.net, ids, there, model.collate(conditions))
    torch.testing.assert_close(ours[there], theirs[there], rtol=0, atol=tiny_llm.CLOSE)
    assert (ours.softmax(-1).amax(-1) < 0.9).all(), "it is not sure of anything: all of it is compared"


def test_padding_is_not_read(folder: Path) -> None:
    tiny_llm.padding_is_not_read(tiny_llm.loaded(folder), PROMPTS)


def test_gradients_reach_all_weights_or_the_adapters(folder: Path) -> None:
    tiny_llm.trains(tiny_llm.loaded(folder), PROMPTS)


def test_others_load_what_is_written(folder: Path, tmp_path: Path) -> None:
    _, tokenizer = tiny_llm.written_for_others(tiny_llm.loaded(folder), PROMPTS, tmp_path)
    assert tokenizer.eos_token == "<|im_end|>"


# ---- folders that do not fit -----------------------------------------------------------------------------------------


def broken(one_folder: Path, to: Path) -> Path:
    """A copy, to be spoiled."""
    for file in one_folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("model_type", "hint"),
    [("qwen2_5_vl", "Use the backbone 'qwen_vl'"), ("qwen4", "No backbone reads such a one. Did you mean 'qwen")],
)
def test_a_model_of_another_family_is_refused(one_folder: Path, tmp_path: Path, model_type: str, hint: str) -> None:
    change(broken(one_folder, tmp_path) / "config.json", model_type=model_type)
    with pytest.raises(RecipeError, match=f"a model of the type '{model_type}'.*reads qwen2, qwen3") as no:
        tiny_llm.loaded(tmp_path)
    assert hint in str(no.value)


def test_weights_that_are_missing_or_left_over_are_errors(one_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = broken(one_folder, tmp_path) / "model.safetensors"
    weights = load_file(file)
    lost = "model.layers.1.mlp.up_proj.weight"
    save_file({name: one for name, one in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=f"lacks weights of Qwen3ForCausalLM: {lost}"):
        tiny_llm.loaded(tmp_path)
    save_file(weights | {"score.weight": torch.zeros(1)}, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"has weights that are not in Qwen3ForCausalLM: score\.weight"):
        tiny_llm.loaded(tmp_path)
    untied = {name: one for name, one in weights.items() if name != "lm_head.weight"}
    save_file(untied, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"lacks weights of Qwen3ForCausalLM: lm_head\.weight"):
        tiny_llm.loaded(tmp_path)


def test_pickled_weights_are_not_read(one_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = broken(one_folder, tmp_path) / "model.safetensors"
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(RecipeError, match=r"cannot be read.*Only safetensors are read"):
        tiny_llm.loaded(tmp_path)


def test_code_in_a_folder_is_not_run(one_folder: Path, tmp_path: Path) -> None:
    broken(one_folder, tmp_path)
    change(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    change(tmp_path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Words", None]})
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tiny_llm.loaded(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda at: (at / "config.json").unlink(), "has no config.json. Give a folder of transformers"),
        (lambda at: (at / "config.json").rename(at / "model_index.json"), "It is a diffusers pipeline"),
        (lambda at: (at / "config.json").write_text("[]"), "is not the configuration of a model"),
        (lambda at: (at / "chat_template.jinja").unlink(), "has no chat template"),
        (lambda at: change(at / "config.json", max_position_embeddings=100), "at most 100 tokens.*and not 256"),
    ],
    ids=["nothing", "a pipeline", "no type", "no chat", "too short"],
)
def test_a_folder_that_is_not_whole_is_refused(one_folder: Path, tmp_path: Path, spoil, message: str) -> None:
    spoil(broken(one_folder, tmp_path))
    with pytest.raises(RecipeError, match=message):
        tiny_llm.loaded(tmp_path)


def test_a_folder_has_no_revision(one_folder: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder and has no revision 'main'"):
        tiny_llm.loaded(one_folder, revision="main")


def test_of_a_hub_name_the_type_is_looked_at_before_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[list[str]] = []
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')

    def download(path: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(RecipeError, match="someone/something is a model of the type 'bert'"):
        registry.build("backbones", "qwen", {"path": "someone/something"}).load(torch.device("cpu"), torch.float32)
    assert asked == [["config.json"]]


def test_options_are_checked() -> None:
    with pytest.raises(RecipeError, match="longest must be 2 tokens or more"):
        registry.build("backbones", "qwen", {"longest": 1})


def test_the_card_is_read_without_importing_it() -> None:
    cards = {one.name: one.constants for one in registry.describe("backbones")}
    assert (cards["qwen"]["kind"], cards["qwen"]["tasks"]) == ("tokens", ("text",))
    assert (cards["qwen_vl"]["kind"], cards["qwen_vl"]["tasks"]) == ("tokens", ("text", "caption"))
