"""The embedded world's agent: Qwen3's real class at toy size, a language model that reads what it is told and copies.

The tokenizer is a byte-level BPE in which every word of the world, of the atlas, of a tool call and of an experience is
one token, and any other text is still readable, byte by byte. Marks such as `": "` are one token too, so that JSON is
short. 0.6 M parameters. The shipped weights are what `rlkit pretrain-agent` made; `tiny_agent_base/scores.json` says
how, and how good they are. They have never seen a tool call, nor what the atlas says of any place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlkit.backbones.qwen import Qwen
from rlkit.errors import RecipeError
from rlkit.types import TokenModel
from rlkit.world import atlas, grammar

BASE = Path(__file__).parent / "tiny_agent_base"
LONGEST = 512  # tokens of a conversation
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Of an agent's turns and of what it is told: one token each that a text may hold, as a word may.
TAGS = ("think", "tool_call", "answer", "tool_response")
PUNCTUATION = (
    *(".", ",", ":", ";", "?", "!", "'", "-", "(", ")", "\n", '"', ' "', '",', '":', '{"', '"}', '"}}', "[]"),
    *('": "', '", "', '": {"', '": ["', '": []', '": []}', '"]}', "}", "}}", "{", "[", "]", "_", "/", "<", ">", "="),
)
WORDS = (  # beside those of the world and of the atlas
    *("name", "arguments", "query", "skill", "search", "image_search", "query_knowledge", "find", "gen_prompt"),
    *("reference_images", "IMG_", "tool", "tools", "call", "answer", "error", "JSON", "string", "object", "results"),
    *("Experience", "references", "skills", "prompt", "failure", "looked", "up", "guessed", "called", "wrote", "gave"),
    *("asked", "ask", "for", "did", "not", "no", "nothing", "that", "this", "these", "one", "unknown", "missing"),
    *("I", "need", "know", "Now", "now", "The", "In", "first", "second", "stands", "shows", "show", "me", "style"),
    *("what", "What", "does", "is", "are", "there", "which", "say", "says", "repeat", "quote", "write", "under", "as"),
    *("flag", "emblem", "draw", "paint", "please", "text", "title", "You", "you", "mean", "Did", "with", "or", "to"),
    *("user", "assistant", "system", "only", "be", "has", "must", "found", "match", "matches", "used", "use"),
    *("neither", "nor", "holds", "Expecting", "delimiter", "at", "character", "property", "enclosed", "double"),
    *("quotes", "Tools", "Known", "Arguments", "such", "argument", "given", "turn", "ends", "an", "wrong", "any"),
    *(
        "No",
        "document",
        "documents",
        "fits",
        "skill",
        "picture",
        "named",
        "was",
        "Search",
        "Read",
        "Then",
        "then",
        "time",
    ),
)
# Words, digits one by one, and marks that stand together, also across single spaces.
PIECES = r" ?[\p{L}_]+| ?\p{N}|\n| ?[^\s\p{L}\p{N}_]+(?: [^\s\p{L}\p{N}_]+)*|\s+"
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def vocabulary() -> tuple[str, ...]:
    """Every word that is one token, with and without a space before it."""
    names = (*atlas.FIRST, *atlas.SECOND, *atlas.STYLES)
    return tuple(dict.fromkeys((*grammar.VOCABULARY[4:], *names, *WORDS)))


def new_tokenizer() -> Any:
    """Bytes, the words with and without a space before them, marks, the tags and the special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bytewise.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    words = vocabulary()
    bytewise.train_from_iterator([*words, *(f" {word}" for word in words), *PUNCTUATION], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tags = [form.format(tag) for tag in TAGS for form in ("<{}>", "</{}>")]
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


def new_network(tokenizer: Any) -> Any:
    """An untrained Qwen3 of the tiny size."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    end, pad = (int(tokenizer.convert_tokens_to_ids(one)) for one in ("<|im_end|>", "<|endoftext|>"))
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.06,  # copying is learnt in fewer steps than from the usual 0.02
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    net = Qwen3ForCausalLM(config)
    net.generation_config.eos_token_id = end
    net.generation_config.pad_token_id = pad
    return net


@dataclass(frozen=True)
class TinyAgent:
    """The embedded world's agent: a Qwen3 of 0.6 M parameters that reads what it is told, and copies from it.

    `path`: a folder that `rlkit pretrain-agent` wrote; by default the weights that ship with rlkit.
    """

    kind = "tokens"
    tasks = ("text",)
    licence = "Apache-2.0"
    parameters = "0.6 M"
    paper = ""

    path: str | None = None
    system: str = ""  # what it is told to be, in prompts that do not say so themselves
    longest: int = LONGEST  # tokens of a conversation, the last answer among them

    def __post_init__(self) -> None:
        if self.longest < 2:
            raise ValueError(f"longest must be 2 tokens or more, one of an answer, not {self.longest}")

    def load(self, device: torch.device, dtype: torch.dtype) -> TokenModel:
        """The network with its tokenizer, as `qwen` loads any other."""
        folder = Path(self.path) if self.path else BASE
        if not (folder / "config.json").is_file():
            what = f"there is no agent in {folder}"
            raise RecipeError(what, where="policy.backbone.path", hint=f"rlkit pretrain-agent --out {folder}")
        return Qwen(path=str(folder), system=self.system, longest=self.longest).load(device, dtype)
