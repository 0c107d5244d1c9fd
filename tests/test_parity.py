"""`rlkit check-backbone`: what it says of a backbone that does what it should, and of one that does not."""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlkit import parity
from rlkit.errors import RecipeError
from rlkit.types import FlowModel, Prompt

CPU = torch.device("cpu")


def found(model: FlowModel) -> dict[str, bool | None]:
    return {one.name: one.passed for one in parity.checks(model, CPU)}


def oracle(model: FlowModel, off: float = 0.0) -> Callable[..., Tensor]:
    """The pipeline that a model would have: a loop of Euler steps, written by hand."""

    @torch.no_grad()
    def pipeline(prompts: list[Prompt], noise: Tensor, steps: int, guidance: float, negative: str) -> Tensor:
        x, sigmas = noise, model.sigmas(steps)
        told = model.collate(model.encode(prompts))
        untold = model.collate(model.encode([Prompt(0, negative)] * len(prompts)))
        for now, then in itertools.pairwise(sigmas):
            rows = now.repeat(len(x))
            v, free = (model.velocity(model.net, x, rows, one) for one in (told, untold))
            x = x + (then - now) * (free + guidance * (v - free))
        return (model.decode(x) + off).clamp(0, 1)

    return pipeline


def test_a_model_without_a_pipeline_passes_the_rest(tiny_model: FlowModel) -> None:
    verdicts = found(tiny_model)
    assert verdicts.pop("parity, guidance 1") is None
    assert verdicts.pop("parity, guidance 4") is None
    assert all(verdicts.values())
    assert set(verdicts) >= {"LoRA targets", "latents and pictures", "company in a batch", "log-prob ratio, guidance 4"}


def test_parity_is_measured(tiny_model: FlowModel) -> None:
    right = replace(tiny_model, pipeline=oracle(tiny_model))
    prompts = parity.example_prompts(right)
    for guidance in (1.0, 4.0):
        assert parity.pixels_apart(right, prompts, CPU, 3, guidance) < 1e-5
    wrong = replace(tiny_model, pipeline=oracle(tiny_model, off=1e-3))
    assert parity.pixels_apart(wrong, prompts, CPU) > 5e-4
    assert found(wrong)["parity, guidance 1"] is False
    with pytest.raises(RecipeError, match="no pipeline"):
        parity.pixels_apart(tiny_model, prompts, CPU)


def test_what_is_wrong_is_found(tiny_model: FlowModel) -> None:
    lost = found(replace(tiny_model, lora_targets=("to_q", "to_z")))
    assert lost["LoRA targets"] is False
    grey = found(replace(tiny_model, encode_media=lambda media: tiny_model.encode_media(media)[:, :1]))
    assert grey["latents and pictures"] is False

    def mixed(net, x, sigma, cond):  # a row's answer depends on its neighbours
        v = tiny_model.velocity(net, x, sigma, cond)
        return v + 0.1 * v.mean(0, keepdim=True)

    assert found(replace(tiny_model, velocity=mixed))["company in a batch"] is False
    calls = iter(range(10**6))

    def drifting(net, x, sigma, cond):  # as dropout would
        return tiny_model.velocity(net, x, sigma, cond) * (1 + 0.01 * next(calls))

    assert found(replace(tiny_model, velocity=drifting))["log-prob ratio, guidance 1"] is False


def test_prompts_have_the_pictures_that_the_tasks_need(tiny_model: FlowModel) -> None:
    assert all(one.source is None for one in parity.example_prompts(tiny_model))
    for tasks in (("edit",), ("edit", "in_context")):
        edits = parity.example_prompts(replace(tiny_model, tasks=tasks))
        assert all(one.source is not None and one.source.shape == (3, 32, 32) for one in edits)
    assert all(len(one.references) == 1 for one in parity.example_prompts(replace(tiny_model, tasks=("in_context",))))


def test_the_command(small_backbone: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    parity.arguments(parser)
    assert parity.run(parser.parse_args(["tiny", f"path={small_backbone}", "--device", "cpu"])) == 0
    printed = capsys.readouterr().out
    assert "log-prob ratio, guidance 1" in printed
    assert "FAILED" not in printed
    with pytest.raises(RecipeError, match=r"'path' is no option. Write key=value"):
        parity.run(parser.parse_args(["tiny", "path"]))
    monkeypatch.setattr(parity, "checks", lambda *given: [parity.Check("one", "off by 3", False)])
    assert parity.run(parser.parse_args(["tiny", f"path={small_backbone}", "--device", "cpu"])) == 1
    assert "off by 3" in capsys.readouterr().out


def test_with_bf16_the_network_computes_as_in_training(
    small_backbone: Path, tiny_model: FlowModel, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    parity.arguments(parser)
    assert (
        parity.run(parser.parse_args(["tiny", f"path={small_backbone}", "--device", "cpu", "--precision", "bf16"])) == 0
    )
    assert "guidance 4   is off from 1 by 0.0e+00" in capsys.readouterr().out, "the same rows have the same ratio"
    right = replace(tiny_model, pipeline=oracle(tiny_model))
    prompts = parity.example_prompts(right)
    low, exact = (parity.pixels_apart(right, prompts, CPU, 3, 4.0, one) for one in ("bf16", "fp32"))
    assert exact < low < parity.TOLERANCES["bf16"]
    assert "forward" not in vars(tiny_model.net), "the network is left as it was"
    seen: list[torch.dtype] = []

    def pipeline(*given):
        hook = tiny_model.net.proj_out.register_forward_hook(lambda *call: seen.append(call[2].dtype))
        pictures = oracle(tiny_model)(*given)
        hook.remove()
        return pictures

    parity.pixels_apart(replace(tiny_model, pipeline=pipeline), prompts, CPU, 3, 1.0, "bf16")
    assert set(seen) == {torch.bfloat16}, "in the pipeline too"
