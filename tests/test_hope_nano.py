"""hope-nano, as it is shipped: it remembers what it is told, through filler, restarts and kills."""

from __future__ import annotations

import json
import uuid

import httpx2
import numpy as np
import pytest
import torch

from hope_runtime.evaluation.recall import Setting, recall
from hope_runtime.model import Hope
from hope_runtime.training.corpora import read_chats
from hope_runtime.training.personas import answered
from hope_runtime.training.sessions import Material, probe
from hope_runtime.weights import read
from server.loading import shipped


@pytest.fixture(scope="module")
def checkpoint():
    return read(shipped("hope-nano"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return Hope(checkpoint.config, checkpoint.weights)


@pytest.fixture(scope="module")
def material(checkpoint):
    chats = read_chats(shipped("hope-nano") / "chats.jsonl")
    return Material(checkpoint.tokenizer, chats.valid)


def right(answers):
    return sum(answer.right for answer in answers)


def test_it_is_small_and_has_no_attention(checkpoint):
    parameters = sum(tensor.numel() for tensor in checkpoint.weights.values())

    assert 3e6 < parameters < 8e6
    assert (shipped("hope-nano") / "model.safetensors").stat().st_size < 20e6
    assert len(checkpoint.config.attention_blocks) == 0
    assert 2000 <= checkpoint.tokenizer.vocabulary <= 4000


def test_it_recalls_eight_facts_after_two_thousand_tokens_of_chat(model, checkpoint, material):
    answers = recall(model, checkpoint.tokenizer, material, Setting(users=5))

    assert right(answers) >= 36  # of 40; `hope eval recall` has the figure


def test_a_frozen_memory_guesses(model, checkpoint, material):
    answers = recall(model.frozen(), checkpoint.tokenizer, material, Setting(users=3))

    assert right(answers) <= 3  # of 24


def test_of_a_fact_that_was_told_anew_the_newest_is_recalled(model, checkpoint, material):
    setting = Setting(users=3, facts=4, overwritten=4, filler=300)

    answers = recall(model, checkpoint.tokenizer, material, setting)

    assert all(answer.changed for answer in answers)
    assert right(answers) >= 10  # of 12


@torch.no_grad()
def test_rate_zero_is_the_model_with_an_empty_memory_bit_for_bit(model, checkpoint):
    frozen, emptied = model.frozen(), model.nothing(1)
    past = frozen.nothing(1)
    ids = checkpoint.tokenizer.encode("My dog is called Rex. What is my dog's name?")

    for position, token in enumerate(ids):
        x, start = model.embed(torch.tensor([[token]])), torch.tensor([position])
        still = frozen.run(x, start, past, [{}])
        empty = model.run(x, start, emptied, [{}])  # written as it reads, but emptied again
        torch.testing.assert_close(still.hidden, empty.hidden, rtol=0, atol=0)
        past = past._replace(memories=still.memories)
        nothing = model.nothing(1).memories
        emptied = emptied._replace(memories=nothing._replace(ring=empty.memories.ring))

    assert float(past.memories.live.abs().max()) == 0.0
    assert float(empty.memories.live.abs().max()) > 0.0


def test_what_it_was_told_survives_a_kill_of_the_server(serve, tmp_path, checkpoint, material):
    drawn = probe(np.random.default_rng(5), material, facts=4, filler_tokens=300)
    where = ("--model", "hope-nano", "--data-dir", str(tmp_path / "data"))
    name = f"ada-{uuid.uuid4().hex}"

    def say(server, text):
        asked = {
            "input": text,
            "conversation": name,
            "temperature": 0,
            "max_output_tokens": 32,
            "memory": {"rates": {"user": 0}},  # the slow levels rest: this is the fast memory's
        }
        answer = httpx2.post(f"{server.url}/v1/responses", json=asked, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["output"][0]["content"][0]["text"]

    server = serve(*where).greeted()
    for line in [*drawn.told, *drawn.filler]:
        if line.role == "user":
            say(server, line.text)
    server.kill()
    server = serve(*where).greeted()
    said = {question: say(server, question) for question, _ in drawn.questions}

    right = [answered(said[question], fact) for question, fact in drawn.questions]
    assert sum(right) >= 3, json.dumps(said)
