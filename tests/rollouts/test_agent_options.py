"""The options of the rollout `agent`: what an agent is told, which tools it has, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from backbones import tiny_llm

from rlkit.dist import Processes
from rlkit.errors import PluginError, RecipeError
from rlkit.language import LanguagePolicy
from rlkit.rollouts.agent import Agent
from rlkit.types import Prompt

ASKED = Prompt(7, "draw the flag")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> LanguagePolicy:
    folder = tiny_llm.save(tmp_path_factory.mktemp("agent"), "qwen3")
    return LanguagePolicy(tiny_llm.loaded(folder), None, torch.device("cpu"), "fp32", 0)


def test_the_instructions_are_those_of_the_tools_unless_the_recipe_has_others(policy: LanguagePolicy) -> None:
    rollout = Agent(tools={"query_knowledge": {"folder": "world"}}).start(policy, Processes())
    assert "query_knowledge" in rollout.instructions
    assert rollout.instructions == rollout.toolbox.described()
    told = rollout.asked(replace(ASKED, system="Experience:\nskills: marsh"))
    assert told.system == f"{rollout.instructions}\n\nExperience:\nskills: marsh"
    silent = Agent(instructions="").start(policy, Processes())
    assert silent.asked(ASKED).system == ""
    rollout.close()


def test_a_tool_may_be_called_by_another_name(policy: LanguagePolicy) -> None:
    tools = {"skills": {"tool": "query_knowledge", "folder": "world"}, "search": None}
    rollout = Agent(tools=tools).start(policy, Processes())
    assert list(rollout.toolbox.tools) == ["skills"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": 0}, "turns must be 1 or more"),
        ({"calls": -1}, "calls must be 0 or more"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"observation": 0}, "observation must be 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Agent(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"writer": {"name": "vllm", "urls": ["http://a"], "ahead": 1, "max_age": 1}}, r"rollout\.writer\.ahead"),
        ({"writer": {"name": "relay"}}, "'relay' does not write one turn after the other"),
        ({"writer": {"name": "agent"}}, "'agent' does not write one turn after the other"),
        ({"writer": {"name": "processes"}}, "'processes' does not write one turn after the other"),
        ({"writer": {"name": "local", "mots": 3}}, r"rollout\.writer: .*Did you mean 'most'"),
        ({"tools": {"search": {"fodler": "world"}}}, r"rollout\.tools\.search: .*Did you mean 'folder'"),
        ({"renderer": {"steps": 3}}, r"rollout\.renderer: draws with a backbone or at a url"),
    ],
)
def test_parts_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Agent(**options)


def test_a_tool_that_nobody_knows_is_refused() -> None:
    with pytest.raises(PluginError, match="Did you mean 'search'"):
        Agent(tools={"serach": {}})


def test_a_tool_without_a_readable_signature_is_refused(policy: LanguagePolicy) -> None:
    tools = {"join": {"tool": "os.path:join"}}
    with pytest.raises(RecipeError, match=r"rollout\.tools: tool 'join'"):
        Agent(tools=tools).start(policy, Processes())
