"""Tiny networks that vLLM and transformers both load, and the two side by side, for tests of real vLLM.

They are untrained and drawn wide, so that any weight that did not arrive moves every log-prob. Needs vLLM only where an
engine is started.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import transformers
from tiny_vlm import _tokenizer

from rlkit.types import Span
from rlkit.workers.push import Canary
from rlkit.workers.serving import Engine
from rlkit.workers.vllm_offline import Offline
from rlkit.workers.worker import Fault, Request, Worker

EXACT = 1e-5  # fp32 against fp32, other kernels
ENDS = (263,)
PROMPT = tuple(range(40, 70))
ENGINE = Engine(dtype="float32", longest=256, sequences=8, cpu=True, cpu_memory=1)
TARGETS = r"model\.(language_model\.)?layers\..*\.(q_proj|v_proj|o_proj|up_proj)"  # none in the tower that sees


# ---- networks --------------------------------------------------------------------------------------------------------


def save_tiny_text(folder: Path, tied: bool) -> None:
    """Qwen2 with 2 layers, its tokenizer, and a generation_config that would change the distribution."""
    tokenizer = _tokenizer()
    config = transformers.Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        eos_token_id=ENDS[0],
        pad_token_id=ENDS[0],
        bos_token_id=None,
    )
    model = drawn(lambda: transformers.Qwen2ForCausalLM(config), 0)
    model.generation_config.update(do_sample=True, top_p=0.5, top_k=3, repetition_penalty=1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def drawn(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def redrawn(model: Any, seed: int) -> None:
    """Other weights: every one moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.02 * torch.randn(one.shape, generator=generator))


@torch.no_grad()
def log_probs(
    model: Any, prompt: Sequence[int], ids: Sequence[int], temperature: float, never: int | None = None, **pictures: Any
) -> list[float]:
    """Of the answer's tokens, by transformers, if the token `never` has no probability."""
    whole = torch.tensor([[*prompt, *ids]])
    logits = model(input_ids=whole, **pictures).logits[0, len(prompt) - 1 : -1].float()
    if never is not None:
        logits[:, never] = -torch.inf
    table = (logits / temperature).log_softmax(-1)
    return table.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], most: int, **pictures: Any) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + most and (len(ids) == len(prompt) or ids[-1] not in ENDS):
        ids.append(int(model(input_ids=torch.tensor([ids]), **pictures).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# ---- one engine in this process --------------------------------------------------------------------------------------


@dataclass
class Rig:
    worker: Worker
    model: Any  # transformers' own, whose weights are pushed
    folder: Path
    version: int = 0

    def differs(self, temperature: float = 0.7) -> float:
        """The largest difference of a log-prob, of sampled answers and of the most probable one."""
        (sampled,) = self.worker.answer([Request(PROMPT, 24, 3, temperature, seed=self.version, ends=ENDS)], 60)
        ((best,),) = self.worker.answer([Request(PROMPT, 24, temperature=0, ends=ENDS)], 60)
        assert list(best.ids) == greedy(self.model, PROMPT, 24)
        assert len({one.ids for one in sampled}) == 3, "answers of one request have seeds of their own"
        worst = 0.0
        for one in (*sampled, best):
            expected = log_probs(self.model, PROMPT, one.ids, temperature if one is not best else 1.0)
            worst = max(worst, *(abs(a - b) for a, b in zip(one.log_probs, expected, strict=True)))
            assert one.spans == (Span(self.version, 0, len(one.ids)),)
        return worst

    def canary(self) -> Canary:
        request = Request(PROMPT, 8, temperature=0.5, seed=3, ends=ENDS)
        return Canary(request, lambda ids: log_probs(self.model, PROMPT, ids, 0.5), EXACT)

    def push(self, by: Any, weights: Any = None) -> None:
        self.version += 1
        given = dict(self.model.named_parameters()) if weights is None else weights
        by(self.worker, by.prepare(given, self.version), self.version)


def rig(folder: Path, model_class: str, engine: Engine) -> Iterator[Rig]:
    before, compiled = dict(os.environ), torch._dynamo.config.disable
    torch._dynamo.config.disable = True  # else the sampler's kernels are compiled at the first request, for a minute
    model = getattr(transformers, model_class).from_pretrained(folder).eval()
    worker = Offline(folder, engine).open()
    try:
        yield Rig(worker, model, folder)
    finally:
        worker.close()
        os.environ.clear()
        os.environ.update(before)
        torch._dynamo.config.disable = compiled


def adapter(rig: Rig, seed: int, rank: int) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """(network with a LoRA that is not 0, its weights, its configuration)."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    plain = copy.deepcopy(rig.model)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
    adapted = get_peft_model(plain, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in adapted.named_parameters():
            if "lora_" in name:
                one.copy_(0.07 * torch.randn(one.shape, generator=generator))
    weights = {name: one.detach().clone() for name, one in get_peft_model_state_dict(adapted).items()}
    written = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": TARGETS, "bias": "none"}
    return adapted, weights, written | {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(rig.folder)}


@dataclass(frozen=True)
class Shown:
    """A prompt with two pictures in it, and what transformers makes of them."""

    request: Request
    given: Mapping[str, torch.Tensor]

    def differs(self, rig: Rig) -> float:
        """The largest difference of a log-prob."""
        (told,) = rig.worker.answer([self.request], 300)
        assert not isinstance(told, Fault), told
        beside = {name: one for name, one in self.given.items() if name not in ("input_ids", "attention_mask")}
        types = beside["mm_token_type_ids"]
        beside["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, len(told[0].ids))], 1)
        asked = self.request
        expected = log_probs(rig.model, asked.ids, told[0].ids, asked.temperature, asked.picture_token, **beside)
        return max(abs(a - b) for a, b in zip(told[0].log_probs, expected, strict=True))
