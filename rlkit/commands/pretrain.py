"""`rlkit pretrain-...`: make the weights that ship with rlkit, from nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlkit import registry, sources
from rlkit.errors import RecipeError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings, such as samples=200000")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the backbone goes")


def generator(options: argparse.Namespace) -> int:
    from rlkit.pretrain.generator import Pretraining, pretrain

    pretrain(options.out, _settings(Pretraining, options, "pretrain-world"))
    return 0


def agent(options: argparse.Namespace) -> int:
    from rlkit.pretrain.agent import Reading, pretrain_agent

    pretrain_agent(options.out, _settings(Reading, options, "pretrain-agent"))
    return 0


def captioner(options: argparse.Namespace) -> int:
    from rlkit.pretrain.captioner import Captioning, pretrain_captioner

    pretrain_captioner(options.out, _settings(Captioning, options, "pretrain-captioner"))
    return 0


def connector(options: argparse.Namespace) -> int:
    from rlkit.pretrain.connector import Connecting, pretrain_connector

    pretrain_connector(options.out, _settings(Connecting, options, "pretrain-connector"))
    return 0


def encoder(options: argparse.Namespace) -> int:
    from rlkit.pretrain.encoder import Encoding, pretrain_encoder

    pretrain_encoder(options.out, _settings(Encoding, options, "pretrain-encoder"))
    return 0


def _settings(kind: type[Any], options: argparse.Namespace, command: str) -> Any:
    """The settings that the words give; RecipeError for those that it has not, and for a folder that is in use."""
    settings = {}
    for word in options.words:
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(f"{word!r} is not key=value.", where=command, hint="For instance samples=200000")
        settings[key] = sources.value_of(key, value)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise RecipeError(f"{options.out} exists and is not empty.", where="--out", hint="Choose another folder.")
    return registry.construct(kind, settings, command, what=command)
