"""`rlkit merge`: the weights of several runs as one model, in a stated mixture.

Runs that specialised from one base are closed this way: the sum of their weights, each times its share. All weights:
the shares have to add up to 1, or the base itself would be scaled. LoRA: what is added up are the changes, sum_i
share_i scale_i B_i A_i, which is again a LoRA whose rank is the sum of theirs: A one below the other, B side by side.
So the result is exact, and the shares may be any.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlkit import recipe
from rlkit.errors import RecipeError

if TYPE_CHECKING:
    from rlkit.stages import Setup
    from rlkit.weights import Weights

DOWN, UP = ".lora_A.", ".lora_B."


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, two or more")
    parser.add_argument("--weights", nargs="+", type=float, metavar="SHARE", help="of each (default: equal)")
    parser.add_argument("--out", type=Path, default=Path("merged"), metavar="DIR", help="(default: merged)")


def run(options: argparse.Namespace) -> int:
    count = len(options.runs)
    shares = options.weights or [1 / count] * count
    if count < 2:
        raise RecipeError("there is nothing to merge with.", where="rlkit merge", hint="Name two or more runs.")
    if len(shares) != count or not all(map(math.isfinite, shares)):
        what = f"{count} runs need {count} shares, not {' '.join(f'{share:g}' for share in shares)}."
        raise RecipeError(what, where="--weights")
    if options.out.exists() and any(options.out.iterdir()):
        raise RecipeError("there is something already.", where=str(options.out), hint="Choose another --out.")
    print(merge(options.runs, shares, options.out))
    return 0


def merge(runs: Sequence[Path], shares: Sequence[float], out: Path) -> str:
    """Write the mixture to a folder; returns the line that loads it. RecipeError where the runs do not fit together."""
    from rlkit import session
    from rlkit.held_out import showing

    setups = [_setup(folder) for folder in runs]
    for folder, setup in zip(runs, setups, strict=True):
        if setup.policy.parts:
            raise RecipeError("its policy is of several parts; one of one network can be merged.", where=str(folder))
    first = setups[0].recipe["policy"]
    for folder, setup in zip(runs[1:], setups[1:], strict=True):
        theirs = setup.recipe["policy"]
        if theirs["backbone"] != first["backbone"]:
            what = f"its backbone is {theirs['backbone']} and not {first['backbone']}."
            raise RecipeError(what, where=str(folder), hint="Runs are merged that began with the same weights.")
        if ("lora" in theirs["train"]) != ("lora" in first["train"]):
            raise RecipeError("one of the runs trained LoRA and the other all weights.", where=str(folder))
    policies: list[Weights] = []
    for folder, setup in zip(runs, setups, strict=True):
        policy = session.load_single(setup, folder)
        policy.use(showing(setup.stages[-1], policy).policy_set)
        policies.append(policy)
    if setups[0].policy.lora is not None:
        return _merge_lora(setups[0], policies, shares).export(out)
    if abs(sum(shares) - 1) > 1e-6:
        what = f"the shares add up to {sum(shares):g} and not to 1, which would scale the base."
        raise RecipeError(what, where="--weights")
    return _merge_all(policies, shares).export(out)


def _setup(folder: Path) -> Setup:
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise RecipeError("this is no run folder: it has no recipe.yaml.", where=str(folder))
    return recipe.read(str(file))


def _merge_all(policies: Sequence[Weights], shares: Sequence[float]) -> Weights:
    import torch

    merged = policies[0]
    with torch.no_grad():
        for name, parameter in merged.trainable.items():
            parts = [policy.trainable[name].double() * share for policy, share in zip(policies, shares, strict=True)]
            parameter.copy_(torch.stack(parts).sum(0))
    return merged


def _merge_lora(setup: Setup, policies: Sequence[Weights], shares: Sequence[float]) -> Weights:
    import torch

    from rlkit import session

    loras = [policy.lora for policy in policies if policy.lora is not None]
    if any(policy.trainable.keys() != policies[0].trainable.keys() for policy in policies):
        raise RecipeError("the runs trained different layers.", where="policy.train.lora.targets")
    rank = sum(lora.rank for lora in loras)
    wide = replace(loras[0], rank=rank, alpha=rank)  # scaled by 1
    merged = session.load_single(replace(setup, policy=replace(setup.policy, lora=wide)))
    with torch.no_grad():
        for name, parameter in merged.trainable.items():
            own = [policy.trainable[name] for policy in policies]
            if DOWN in name:
                parameter.copy_(torch.cat(own, dim=0))  # [sum of ranks, in]
            elif UP in name:
                scaled = [share * lora.scale * one for share, lora, one in zip(shares, loras, own, strict=True)]
                parameter.copy_(torch.cat(scaled, dim=1))  # [out, sum of ranks]
    return merged
